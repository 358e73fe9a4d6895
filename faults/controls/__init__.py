"""Negative controls: the product without one of its protections each, as one would write it without knowing.

Each must fail its oracle under the fault that the protection is for, where the product passes the very same
scenario (`tests/fault/test_controls.py`). A control that passes means that an oracle or a scenario is blind.

    watches.NaiveWatch             resumes reading behind its last id, and asks nothing
    watches.CounterWatch           compares revisions that a counter makes (`CounterClient`)
    chains.agreeable_registry      believes that no acknowledged write was ever lost
    retries.RetryingClient         sends again what was not answered, as redis-py does by default
    locks.PlainLocks               redis-py's lock: no fencing, no check at the write
    ports.TolerantRegistry         lets a port be registered that somebody else has
"""
