"""Engines, and the worker that serves one."""
