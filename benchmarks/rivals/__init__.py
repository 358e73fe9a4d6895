"""What the project is measured against, and programs that run on both sides."""
