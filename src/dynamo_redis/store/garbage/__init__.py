"""Garbage collection: the keys of a deployment that no process needs any more, and their removal."""
