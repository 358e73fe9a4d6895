"""Rivals of the suite `start`, and programs that run on both sides."""
