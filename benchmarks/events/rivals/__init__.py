"""Rivals of the suite `events`, and programs that run on both sides."""
