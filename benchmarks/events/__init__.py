"""The suite `events`: event streams beside JetStream."""
