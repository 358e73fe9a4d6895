"""Rivals of the suite `index`, and programs that run on both sides."""
