"""Engines, and the worker that serves an engine."""
