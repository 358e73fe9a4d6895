"""Lua scripts, kept as files in this folder and sent by their hash.

A script is one file, headed by its KEYS, ARGV, answer and what is atomic. Definitions that
several scripts share stand in prelude files, which are put in front of each. `RedisClient.script` runs
them: EVALSHA, and EVAL only when the server does not know the hash.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script: its name (for errors and logs), its source, and the hash the server knows it by."""

    name: str
    source: str = field(repr=False)
    sha: str

    @classmethod
    def of(cls, name: str, source: str) -> Script:
        """A script from its source."""
        return cls(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@cache
def load_script(name: str, *preludes: str) -> Script:
    """The script of `scripts/<name>.lua`, behind those of the preludes named, in order.

    Comments are left out of what is sent: servers keep every script they have seen in memory.
    """
    folder = resources.files(__package__)
    parts = [folder / f"{part}.lua" for part in (*preludes, name)]
    return Script.of(name, "\n".join(_without_comments(part.read_text("utf-8")) for part in parts))


def _without_comments(source: str) -> str:
    lines = (line.rstrip() for line in source.splitlines())
    return "\n".join(line for line in lines if line and not line.lstrip().startswith("--"))
