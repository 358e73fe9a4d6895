"""Replay of a service's request trace through routers and mock workers."""
