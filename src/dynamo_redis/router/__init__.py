"""Chooses workers by the blocks in their KV caches and by their load."""
