"""A server that goes on running, and loses data, its log, or the keys that announce ended leases."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from dynamo_redis.errors import StoreError
from dynamo_redis.store.keys import STRUCTURES, RegistryKeys
from faults.oracles.served import EVERYTHING
from faults.run import PREFIX, Run, Scenario
from faults.scenarios.crashes import KEPT_TTL_S, again_and_again
from faults.servers import Word

_KEYS: Final = RegistryKeys(PREFIX)


async def flush(run: Run) -> None:
    """Delete everything (FLUSHALL)."""
    async with run.fault("FLUSHALL", loses="data"):
        await run.observer.read_and_run(run.server, ("FLUSHALL",))


async def delete_structure(run: Run) -> None:
    """Delete one of the registry's keys, which counts as the loss of all."""
    structure = run.rng.choice(STRUCTURES)
    async with run.fault("DEL structure", loses="data", structure=structure):
        await run.observer.read_and_run(run.server, ("DEL", _KEYS.structure(structure)))


async def delete_lease_keys(run: Run) -> None:
    """Delete the keys whose expiry hints at the end of leases; no lease ends by that."""
    async with run.fault("DEL lease keys"):
        keys = await run.server.execute("KEYS", _KEYS.structure("lease:*"))
        doomed = run.rng.sample(keys, run.rng.randint(0, len(keys)))
        if doomed:
            await run.server.execute("DEL", *doomed)


async def trim(run: Run) -> None:
    """Trim the log past every watcher: all but writers are cut off meanwhile, and miss entries."""
    proxies = [proxy for name, proxy in run.proxies.items() if not name.startswith("writer")]
    kept = run.rng.choice((0, 1))
    async with run.fault("XTRIM", kept=kept):
        for proxy in proxies:
            proxy.refuse = True
            proxy.cut()
        await run.pause(0.2, 1.0)
        await run.observer.read_and_run(run.server, ("XTRIM", _KEYS.log, "MAXLEN", kept))
        await run.pause(0.0, 0.5)
        for proxy in proxies:
            proxy.heal()


_JUNK: Final = b"\xc1\xff\x00junk"
_RUBBISH: Final[dict[str, list[tuple[Word, ...]]]] = {
    "meta": [("HSET", "meta", "of a later release", _JUNK)],
    "kv": [("HSET", "kv", "data/junk", _JUNK), ("ZADD", "idx", 0, "data/junk")],
    "idx": [("ZADD", "idx", 0, "data/nothing", 0, _JUNK)],
    "leases": [("ZADD", "leases", 1, "no lease", 1, _JUNK)],
    "lk": [("ZADD", "lk", 0, "no lease\0no key", 0, "~")],
    "lr": [("HSET", "lr", "no lease", _JUNK)],
    "log": [("XADD", "log", "*", "junk", _JUNK)],
    "lease keys": [("SETEX", "lease:no lease", 1, _JUNK)],
}
"""Commands that write values no release writes, by the structure of each."""


async def litter(run: Run) -> None:
    """Write rubbish into one of the registry's structures, and leave it there."""
    where = run.rng.choice(list(_RUBBISH))
    async with run.fault("rubbish", serves=EVERYTHING, where=where):
        commands = [
            (command, _KEYS.structure(str(name)), *words) for command, name, *words in _RUBBISH[where]
        ]
        await run.observer.read_and_run(run.server, *commands)


_ADDED: Final[dict[bytes, tuple[Word, ...]]] = {
    b"hash": (_JUNK, _JUNK),
    b"set": (_JUNK,),
    b"zset": (0, _JUNK),
    b"stream": ("*", _JUNK, _JUNK),
    b"list": (_JUNK,),
}
_COMMANDS: Final = {b"hash": "HSET", b"set": "SADD", b"zset": "ZADD", b"stream": "XADD", b"list": "RPUSH"}


async def litter_everywhere(run: Run) -> None:
    """Write rubbish into every key of the prefix but the registry's own: event streams, objects, locks. What
    replaces a string is deleted after a while."""
    await litter(run)
    replaced: list[bytes] = []
    async with run.fault("rubbish everywhere"):
        for key in await run.server.execute("KEYS", f"{{{PREFIX}/*"):
            with suppress(StoreError):  # the key has gone, or moved to another node
                kind = await run.server.execute("TYPE", key)
                if kind in _ADDED:
                    await run.server.execute(_COMMANDS[kind], key, *_ADDED[kind])
                elif await run.server.execute("SET", key, _JUNK, "XX", "KEEPTTL"):
                    replaced.append(key)
        await run.pause(0.1, 1.0)
        for key in replaced:
            with suppress(StoreError):
                await run.server.execute("DEL", key)


async def save(run: Run) -> None:
    """Let the server fork, to write a snapshot or its append-only file anew; one at a time, so it may
    refuse."""
    command = run.rng.choice(("BGSAVE", "BGREWRITEAOF"))
    async with run.fault(command):
        with suppress(StoreError):
            await run.server.execute(command)


SCENARIOS = (
    Scenario("flushall", "FLUSHALL", again_and_again(flush, 0.8, 2.5)),
    Scenario(
        "structures", "single keys of the registry deleted", again_and_again(delete_structure, 0.8, 2.5)
    ),
    Scenario(
        "lease-keys",
        "the TTL keys of leases deleted",
        again_and_again(delete_lease_keys, 0.2, 1.0),
        keeps_leases=True,
    ),
    Scenario(
        "trim",
        "the change log trimmed past watchers that are cut off",
        again_and_again(trim),
        keeps_leases=True,
        ttl_s=KEPT_TTL_S,
    ),
    Scenario(
        "rubbish",
        "rubbish written into the registry's own keys",
        again_and_again(litter, 0.1, 0.6),
        keeps_leases=True,
        ttl_s=KEPT_TTL_S,
    ),
    Scenario(
        "save",
        "snapshots (BGSAVE) and rewrites of the append-only file, one after the other",
        again_and_again(save, 0.05, 0.3),
        keeps_leases=True,
    ),
)
