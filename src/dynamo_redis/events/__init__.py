"""Events that workers publish: of their KV caches and their load."""
