"""What workers and clients use: the distributed runtime and what it hands out."""
