"""Lua scripts, kept as files in this folder and sent by their hash.

A script is one file. Its head documents its KEYS, ARGV, answer and atomicity. Definitions that several
scripts share are in prelude files, which are put in front of each. `RedisClient.script` runs a script by
EVALSHA, and by EVAL only when the server does not know the hash.
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
        """Return a script with the hash of its source."""
        return cls(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@cache
def load_script(name: str, *preludes: str) -> Script:
    """Load `scripts/<name>.lua`, preceded by preludes in order.

    Comments are left out of the source that is sent: a server keeps every script it has seen in memory.
    """
    folder = resources.files(__package__)
    parts = [folder / f"{part}.lua" for part in (*preludes, name)]
    lines = (line.rstrip() for part in parts for line in part.read_text("utf-8").splitlines())
    return Script.of(name, "\n".join(line for line in lines if line and not line.lstrip().startswith("--")))
