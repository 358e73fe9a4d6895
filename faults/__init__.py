"""Faults of every kind on a real deployment, and the oracles that say what they broke.

`python -m faults --help`. Needs nothing but this checkout and a Redis or Valkey; see `docs/guarantees.md` for
what came out.
"""
