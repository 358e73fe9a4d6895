"""Rivals of the suite `registry`, and programs that run on both sides."""
