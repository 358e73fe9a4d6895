"""Choosing workers by what their KV caches hold."""
