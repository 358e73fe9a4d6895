"""Negative controls: the product without one of its protections each, as a naive implementation would be.

Each must fail its oracle under the fault that the protection is for, where the product passes the very same
scenario (`tests/fault/test_controls.py`). If a control passes, an oracle or a scenario does not see the
fault.

    watches.NaiveWatch             resumes reading behind its last id, without a check
    watches.CounterWatch           compares revisions that a counter makes (`CounterClient`)
    chains.agreeable_registry      assumes that no acknowledged write was ever lost
    retries.RetryingClient         sends unanswered commands again, as redis-py does by default
    locks.PlainLocks               redis-py's lock: no fencing, no check at the write
    ports.TolerantRegistry         registers a port that another tenant has
"""
