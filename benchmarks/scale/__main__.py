"""Suite `scale`: a thousand simulated workers and eight routers on one Redis on loopback.

L1  CPU of Redis at 2,000 chats a second: KV events, bookings and load of a thousand workers
L2  time from the publication of an event until one router has applied it, at 300 chats a second
L3  memory of Redis there; connections of a process
L4  blocks that a router applies in a second of CPU time, against decoding the same bytes
L5  what it costs Redis to have the events in three shards on three masters
L6  CPU of Redis with a thousand workers that have nothing to do, and tell their load
L7  chats that one router carries in a second of CPU time
L8  start of a thousand workers at once

Engines are simulated; publishers, readers, registry and routers are those of the product. `--rows L5` runs
some.
"""

from __future__ import annotations

from benchmarks.harness.suite import Bounds, Groups, run_suite
from benchmarks.scale.engine import ANSWER_TOKENS, BLOCK_TOKENS, PROMPT_BLOCKS
from benchmarks.scale.rows import applied, lag, routed, shards, whole

BOUNDS: Bounds = {
    "L1": (
        (
            "Redis CPU at 1,000 workers, 8 routers, 2,000 chats/s by rate, answers of 200 tokens, from an "
            "empty stream on, % of a core"
        ),
        50.0,
        20.0,
    ),
    "L2": ("event published → applied, one timed router, 300 chats/s of 1,000 workers, p99 ms", 50.0, 15.0),
    "L7": (
        (
            "chats/s that one router process (choose, book, sync, follow events) carries on one core, 1,000 "
            "workers"
        ),
        2000.0,
        4000.0,
    ),
    "L8": (
        "1,000 workers start at once: bytes read from Redis, MB; until all routers list them, s",
        [100.0, 10.0],
        [30.0, 5.0],
    ),
    "L3": ("Redis memory there, MB; connections a process", [600.0, 4.0], [300.0, 2.0]),
    "L4": (
        (
            "blocks a second one router applies from streams, one core ÷ decoding the same bytes with "
            "msgpack alone"
        ),
        0.25,
        0.5,
    ),
    "L6": (
        "Redis CPU with 1,000 idle workers that tell their load and 8 routers, % of a core",
        10.0,
        4.0,
    ),
    "L5": (
        (
            "Redis CPU a 1,000 events on one master ÷ the sum over 3 masters with the stream in shards (what "
            "sharding costs; cores do not bound it)"
        ),
        0.9,
        0.98,
    ),
}
"""Text, bound (`must`) and aim of each row."""

GROUPS: Groups = (
    (("L8", "L6", "L1", "L3"), whole),
    (("L2",), lag),
    (("L7",), routed),
    (("L4",), applied),
    (("L5",), shards),
)
"""The rows of each measurement."""


def main() -> None:
    """Run the suite, or the rows of the command line."""
    run_suite("scale", __doc__, BOUNDS, GROUPS, _conditions)


def _conditions(_: set[str], rounds: int) -> list[str]:
    """Return the conditions of the measurement that a reader needs to judge the figures."""
    return [
        f"{rounds} windows of 5 s; prompts of {PROMPT_BLOCKS} blocks of {BLOCK_TOKENS} tokens, 36 % repeated",
        f"answers of {ANSWER_TOKENS} tokens, 50 a second",
        "L1 and the memory of L3 are sums of two deployments: workers without chats, chats without workers",
    ]


if __name__ == "__main__":
    main()
