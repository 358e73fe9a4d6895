"""S8: the time of the product's scripts and commands inside Redis in a large store, against a small one.

One server holds a registry, an event stream and objects of 1,000 keys or entries each, another of 100,000.
Each script, and each command that clients send themselves, runs on both in turn. Its time inside the server
counts (SLOWLOG, in whole µs, without the way there). A script's figure is the mean of the quicker half of its
calls; a command's that of a hundred in one script, since one takes a microsecond or two. Each side has three
turns, of which the quickest counts.

A call whose work grows with the store by its nature does the same work on both sides: a trim drops two
entries, a page has a hundred keys. The row is the worst ratio of all.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

from benchmarks.harness.processes import redis_server
from benchmarks.harness.report import Measured
from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.store.garbage import collector
from dynamo_redis.store.garbage.survey import Kind
from dynamo_redis.store.keys import RegistryKeys, StreamKeys, format_lease
from dynamo_redis.store.locks import redis_locks
from dynamo_redis.store.objects import chunks, redis_objects
from dynamo_redis.store.redis.client import Argument, RedisClient
from dynamo_redis.store.registry.scripts_api import KeyValue, OwnedPut, encode_write
from dynamo_redis.store.scripts import Script
from dynamo_redis.store.streams import readers, redis_streams

FEW: Final = 1_000
MANY: Final = 100_000
CALLS: Final = 40
TURNS: Final = 3
LOOPS: Final = 100
SETTINGS: Final = {"slowlog-log-slower-than": "0", "slowlog-max-len": str(4 * CALLS)}
"""Settings of the servers."""
PREFIX: Final = "walks"
CONTENT: Final = b"x" * 100
STREAM: Final = StreamName("dynamo", "backend", "kv_events")
GROUP: Final = "router"
LEASE: Final = LeaseId(1 << 62)
NO_AGE: Final = ""
LONG_MS: Final = 3_600_000

Words = Sequence[Argument]
Timed = Callable[[], Awaitable[float]]


class ScriptCase(NamedTuple):
    """A script and its arguments; `before` runs before each call."""

    script: Script
    keys: Words
    args: Words
    before: Callable[[], Awaitable[object]] | None = None


class FilledServer:
    """One server, with `count` of everything."""

    def __init__(self, url: str, count: int) -> None:
        self.client = RedisClient(url, timeout_s=120, client_name="walks")
        self.count = count
        self.registry = RegistryKeys(PREFIX)
        self.kv = KeyValue(self.client, self.registry)
        self.stream = StreamKeys(PREFIX, STREAM)
        self.names = f"{{{PREFIX}/object}}:names"
        self.incarnation = ""
        self.middle = b""
        self.number = 0

    async def fill(self) -> None:
        """Fill the server: a key, a lease, a log entry and a stream entry for each number."""
        self.incarnation = (await self.kv.initialize()).incarnation
        await self.kv.write([OwnedPut("mine", CONTENT)], lease=LEASE, ttl_s=3600)
        packed = (await self.client.execute("HGET", self.registry.structure("kv"), "mine")) or b""
        for start in range(0, self.count, 1000):
            numbers = range(start, start + 1000)
            await self.client.pipeline(self._registered(numbers, packed))
            await self.client.pipeline(self._appended(numbers))
            # Each change is an entry of the log.
            await self.kv.write([OwnedPut("mine", CONTENT)] * 1000, lease=LEASE)
        await self.client.script(readers._CREATE, self.stream.all, [GROUP])
        half = await self.client.execute("XRANGE", self.stream.events, "-", "+", "COUNT", FEW // 2)
        self.middle = half[-1][0]
        await self.client.execute("XGROUP", "SETID", self.stream.events, GROUP, "0")
        group = ("GROUP", GROUP, "reader", "COUNT", 10)
        await self.client.execute("XREADGROUP", *group, "STREAMS", self.stream.events, ">")

    def _registered(self, numbers: range, packed: bytes) -> list[Words]:
        key = self.registry.structure
        commands: list[Words] = []
        for number in numbers:
            name, lease = f"other/{number:06}", f"{number:x}"
            commands += [
                ("HSET", key("kv"), name, packed.replace(format_lease(LEASE).encode(), b"0" * 16)),
                ("ZADD", key("idx"), 0, name),
                ("ZADD", key("leases"), LONG_MS * 24, lease),
                ("ZADD", key("lk"), 0, f"{lease}\0{name}"),
                ("HSET", key("lr"), lease, "1-1 a b"),
                ("ZADD", self.names, number, f"bucket/{number:06}"),
                ("SET", f"{{{PREFIX}/object/b/{number}}}:current", b"x"),
            ]
        return commands

    def _appended(self, numbers: range) -> list[Words]:
        commands: list[Words] = [("XADD", self.stream.events, "*", "c", CONTENT) for _ in numbers]
        commands.append(("RPUSH", self.stream.sizes, *([b"1 100"] * len(numbers))))
        commands.append(("HINCRBY", self.stream.meta, "events", len(numbers)))
        commands.append(("HINCRBY", self.stream.meta, "bytes", len(numbers) * len(CONTENT)))
        return commands

    # ------------------------------------------------------------------ scripts and commands

    def scripts(self) -> dict[str, ScriptCase]:
        """Return the cases of each script of the product by name, one or more (`name: variant`)."""
        return (
            self._registry_scripts()
            | self._stream_scripts()
            | self._other_scripts()
            | self._garbage_scripts()
        )

    def _operation(self) -> str:
        self.number += 1
        return f"op{self.number}"

    def _registry_scripts(self) -> dict[str, ScriptCase]:
        keys, kv, lease = self.registry.structures, self.kv, format_lease(LEASE)
        leased = (*keys, self.registry.lease(LEASE))
        put = [OwnedPut("mine", CONTENT)]
        once = encode_write("", "once", "", LEASE, 0, (), put)
        again = encode_write("", "absent", "0-0 x", LEASE, 0, (), put)
        few = (self.registry.meta, *map(self.registry.structure, ("leases", "lr")), leased[-1])
        return {
            "registry_init": ScriptCase(kv._INIT, keys, ("", self._operation(), "i", "1")),
            "registry_read": ScriptCase(
                kv._READ, keys, ("", "o", lease, "", 100, 1 << 20, "mine", "other/000500")
            ),
            "registry_snapshot": ScriptCase(kv._SNAPSHOT, keys, ("", "o", "other/", "", 100, 1 << 20)),
            "registry_tick": ScriptCase(kv._TICK, keys, ("", "o")),
            "registry_keepalive": ScriptCase(kv.KEEPALIVE, few, (self.incarnation, lease, LONG_MS)),
            "registry_write": ScriptCase(kv.WRITE, leased, once),
            "registry_write: again": ScriptCase(kv.WRITE, leased, again),
            "registry_revoke": ScriptCase(
                kv._REVOKE,
                (*keys, self.registry.lease(LeaseId(7 << 60))),
                ("", "o", format_lease(LeaseId(7 << 60))),
                lambda: kv.write([OwnedPut("short", CONTENT)], lease=LeaseId(7 << 60), ttl_s=3600),
            ),
        }

    def _stream_scripts(self) -> dict[str, ScriptCase]:
        keys = self.stream.all
        return {
            "stream_open": ScriptCase(redis_streams._OPEN, keys, ()),
            "stream_create": ScriptCase(readers._CREATE, keys, ("another",)),
            "stream_seek": ScriptCase(readers._SEEK, keys, (GROUP, self.middle)),
            "stream_beat": ScriptCase(readers._BEAT, keys, (GROUP, LONG_MS)),
            "stream_info": ScriptCase(redis_streams._INFO, keys, ()),
            "stream_bound": ScriptCase(redis_streams._BOUND, keys, (1 << 30, 1 << 40, NO_AGE)),
            "stream_bound: by time": ScriptCase(redis_streams._BOUND, keys, (1 << 30, 1 << 40, LONG_MS)),
            "stream_keep": ScriptCase(redis_streams._KEEP, keys, (LONG_MS,)),
            "stream_trim": ScriptCase(redis_streams._TRIM, keys, ("0-1", LONG_MS)),
            "stream_trim: two entries": ScriptCase(redis_streams._TRIM, keys, ("", LONG_MS), self._trim_two),
        }

    def _other_scripts(self) -> dict[str, ScriptCase]:
        tag = f"{{{PREFIX}/object/b/n}}"
        lock, fence, value = f"{tag}:lock", f"{tag}:fence", f"{tag}:value"
        chunk, current = f"{tag}:chunk:1:a", f"{tag}:current"
        commit = (1, "", 60_000, "", "", "version", "v", "size", "1")
        return {
            "lock_acquire": ScriptCase(redis_locks._ACQUIRE, (lock, fence, value), ("o", 60_000, "p")),
            "lock_renew": ScriptCase(redis_locks._RENEW, (lock,), ("o", 60_000)),
            "lock_write": ScriptCase(redis_locks._WRITE, (lock, value), ("o", 1 << 60, 1, CONTENT)),
            "lock_release": ScriptCase(redis_locks._RELEASE, (lock,), ("other",)),
            "object_claim": ScriptCase(
                chunks._CLAIM, (chunk, f"{tag}:claim", f"{tag}:damaged"), ("a", 60_000, 1, "u", 2000)
            ),
            "object_renew": ScriptCase(chunks._RENEW, (chunk,), (60_000,)),
            "object_commit": ScriptCase(
                redis_objects._COMMIT, (current, lock, f"{tag}:done:v", chunk), commit
            ),
            "object_remove": ScriptCase(redis_objects._REMOVE, (current, chunk), ("other", 60_000)),
            "object_forget": ScriptCase(redis_objects._FORGET, (self.names,), ("bucket/000500", "1")),
        }

    def _garbage_scripts(self) -> dict[str, ScriptCase]:
        tag, kinds = f"{{{PREFIX}/object/b/n}}", collector._SCRIPTS
        lock, current, chunk = f"{tag}:lock", f"{tag}:current", f"{tag}:chunk:1:a"
        unused = ("other", LONG_MS, 60_000)
        return {
            "garbage_object": ScriptCase(collector._OBJECT, (current, lock, chunk), unused),
            "garbage_chunks": ScriptCase(kinds[Kind.CHUNKS], (current, chunk), (60_000, "a")),
            "garbage_expire": ScriptCase(kinds[Kind.TEMPORARY], (chunk,), (60_000,)),
            "garbage_fence": ScriptCase(
                kinds[Kind.LOCKS], (f"{tag}:fence", lock, f"{tag}:value", current), (LONG_MS,)
            ),
            "garbage_stream": ScriptCase(kinds[Kind.STREAMS], self.stream.all, ("1", LONG_MS)),
        }

    async def _trim_two(self) -> Words:
        """Return the arguments of a trim that drops two entries."""
        await self.client.execute("XGROUP", "SETID", self.stream.events, GROUP, "$")
        oldest = await self.client.execute("XRANGE", self.stream.events, "-", "+", "COUNT", 2)
        return (oldest[-1][0], LONG_MS)

    def commands(self) -> dict[str, Words]:
        """Return the commands that clients send themselves and whose structures can grow, by name."""
        key, events = self.registry.structure, self.stream.events
        group = ("GROUP", GROUP, "reader")
        return {
            "XADD": ("XADD", events, "*", "c", CONTENT),
            "RPUSH": ("RPUSH", self.stream.sizes, b"1 100"),
            "HINCRBY": ("HINCRBY", self.stream.meta, "events", 1),
            "XREAD": ("XREAD", "COUNT", 10, "STREAMS", key("log"), self.middle),
            "XREADGROUP": ("XREADGROUP", *group, "COUNT", 10, "STREAMS", events, "0-0"),
            "XACK": ("XACK", events, GROUP, self.middle),
            "XRANGE": ("XRANGE", events, f"({self.middle.decode()}", "+", "COUNT", 10),
            "XREVRANGE": ("XREVRANGE", events, "+", "-", "COUNT", 1),
            "HMGET": ("HMGET", self.registry.meta, "inc", "rev", "op"),
            "HGETALL": ("HGETALL", f"{{{PREFIX}/object/b/none}}:current"),
            "ZADD": ("ZADD", self.names, 1e9, "bucket/000500"),
            "ZREM": ("ZREM", self.stream.groups, "none"),
            "ZSCAN": ("ZSCAN", self.names, 0, "COUNT", 10),
            "SCAN": ("SCAN", 0, "MATCH", f"{{{PREFIX}/*}}:events", "COUNT", 10),
            "SMEMBERS": ("SMEMBERS", f"{{{PREFIX}/object/b/none}}:damaged"),
            "SADD": ("SADD", f"{{{PREFIX}/object/b/d}}:damaged", "a"),
            "SREM": ("SREM", f"{{{PREFIX}/object/b/d}}:damaged", "b"),
            "EXISTS": ("EXISTS", f"{{{PREFIX}/object/b/500}}:current"),
            "EXPIRE": ("EXPIRE", f"{{{PREFIX}/object/b/d}}:damaged", 600),
            "PTTL": ("PTTL", f"{{{PREFIX}/object/b/n}}:lock"),
            "GET": ("GET", f"{{{PREFIX}/object/b/500}}:current"),
            "SET": ("SET", f"{{{PREFIX}/object/b/500}}:current", b"x"),
            "PUBLISH": ("PUBLISH", self.stream.messages, CONTENT),
            "XGROUP": ("XGROUP", "DESTROY", events, "none"),
            "UNLINK": ("UNLINK", f"{{{PREFIX}/object/b/none}}:current"),
        }

    async def script_us(self, case: ScriptCase) -> float:
        """Return the time of a script in µs."""
        args = case.args
        for _ in range(CALLS):
            if case.before is not None:
                found = await case.before()
                args = found if isinstance(found, tuple) else args
            await self.client.script(case.script, case.keys, args)
        return await self._quicker_us()

    async def command_us(self, words: Words) -> float:
        """Return the time of a command in µs."""
        loop = Script.of("loop", f"for _ = 1, {LOOPS} do redis.call(unpack(ARGV)) end return 1")
        for _ in range(CALLS):
            await self.client.script(loop, [words[1]], words)
        return await self._quicker_us() / LOOPS

    async def _quicker_us(self) -> float:
        """Return the mean of the quicker half of the scripts in the server's slow log, and empty the log."""
        entries = await self.client.execute("SLOWLOG", "GET", 4 * CALLS)
        await self.client.execute("SLOWLOG", "RESET")
        took = sorted(int(entry[2]) for entry in entries if entry[3][0].upper().startswith(b"EVAL"))
        return statistics.mean(took[: max(1, len(took) // 2)])


async def compare(urls: Sequence[str], counts: Sequence[int]) -> dict[str, float]:
    """Return the second server's time of each script and command ÷ the first's, by name."""
    few, many = (FilledServer(url, count) for url, count in zip(urls, counts, strict=True))
    found: dict[str, float] = {}
    try:
        for place in (few, many):
            await place.fill()
            await place.client.execute("SLOWLOG", "RESET")
        cases, others = few.scripts(), many.scripts()
        for name in cases:
            found[name] = await _ratio(
                partial(few.script_us, cases[name]), partial(many.script_us, others[name])
            )
        commands, other_commands = few.commands(), many.commands()
        for name in commands:
            found[name] = await _ratio(
                partial(few.command_us, commands[name]), partial(many.command_us, other_commands[name])
            )
    finally:
        for place in (few, many):
            await place.client.aclose()
    return found


async def _ratio(few: Timed, many: Timed) -> float:
    """Return the quickest turn of `many` ÷ that of `few`."""
    turns = [(await few(), await many()) for _ in range(TURNS)]
    return min(took for _, took in turns) / max(1e-3, min(took for took, _ in turns))


def walks(rounds: int) -> dict[str, Measured]:
    """Measure S8, a ratio: the worst of the medians over the rounds."""
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        began = time.monotonic()
        with redis_server(settings=SETTINGS) as one, redis_server(settings=SETTINGS) as other:
            for name, ratio in asyncio.run(compare((one.url, other.url), (FEW, MANY))).items():
                found.setdefault(name, []).append(ratio)
        print(f"S8 round {number + 1} took {time.monotonic() - began:.0f} s", flush=True)
    medians = {name: statistics.median(ratios) for name, ratios in found.items()}
    ordered = sorted(medians, key=lambda name: -medians[name])
    print("S8 worst: " + ", ".join(f"{name} {medians[name]:.2f}" for name in ordered[:8]), flush=True)
    return {"S8": Measured.alone(found[ordered[0]])}
