"""Faults of every kind on a real deployment, and the oracles that find the broken promises.

See `python -m faults --help`. It needs only this checkout and a Redis or Valkey; `docs/guarantees.md` has the
results.
"""
