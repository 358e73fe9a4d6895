"""S8 measures every script and command that the product runs on a server."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from benchmarks.start.walks import FilledServer

ROOT = Path(__file__).resolve().parents[3]
SHARED = {"registry_clock", "registry_prelude", "stream_prelude"}
"""Parts of other scripts."""
ELSEWHERE = {
    *("ping", "time", "info", "role", "asking", "cluster|slots", "client|setname"),  # read no key
    *("multi", "exec", "eval", "evalsha"),
    *("subscribe", "psubscribe"),  # once a connection
    # Sent by scripts alone, which are measured themselves:
    *("del", "type", "pexpire", "persist", "strlen", "hget", "hstrlen", "hset", "hdel", "lpush", "llen"),
    *("lrange", "ltrim", "sismember", "zscore", "zcard", "zcount", "zrange", "zrangebylex"),
    *("zrangebyscore", "xdel", "xlen", "xpending", "xinfo", "xtrim"),
}


def test_each_script_is_measured() -> None:
    folder = resources.files("dynamo_redis.store") / "scripts"
    scripts = {entry.name.removesuffix(".lua") for entry in folder.iterdir() if entry.name.endswith(".lua")}
    measured = {name.partition(":")[0] for name in place().scripts()}
    assert measured == scripts - SHARED


def test_each_command_is_measured() -> None:
    line = next(
        line for line in (ROOT / "docs" / "security.md").read_text().splitlines() if "ACL SETUSER" in line
    )
    allowed = set(re.findall(r" \+([a-z|]+)", line))
    measured = {name.lower() for name in place().commands()}
    assert measured == allowed - ELSEWHERE


def place() -> FilledServer:
    made = FilledServer("redis://127.0.0.1:1", 10)
    made.middle = b"1-1"
    return made
