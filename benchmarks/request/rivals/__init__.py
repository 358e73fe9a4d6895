"""Rivals of the suite `request`, and programs that run on both sides."""
