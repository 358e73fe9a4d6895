"""Fixtures of these tests."""

from tests.routed_deployment import deployment

__all__ = ["deployment"]
