"""Answers by which a node of a cluster says that a key is not here. The command was not run. Pure.

https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#redirection-and-resharding
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dynamo_redis.errors import StoreError
from dynamo_redis.store.redis.server_errors import reply
from dynamo_redis.store.redis.url import Address

ASKING: Final = "ASKING"
"""Makes a node accept the next command for a slot that is moving to it."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The slot is served by another node, now and later."""

    slot: int
    at: Address


@dataclass(frozen=True, slots=True)
class Ask:
    """The slot is moving. This key is at the other node already, or does not exist."""

    at: Address


@dataclass(frozen=True, slots=True)
class TryAgain:
    """The slot is moving, and the command's keys are not all at one node, or some do not exist."""


Redirect = Moved | Ask | TryAgain


def redirect_of(error: StoreError, asked: Address | None) -> Redirect | None:
    """Return the redirect that caused an error; None for another error.

    `asked` is the node that answered. A node that names no host means its own.
    """
    if error.answer_code == "TRYAGAIN":
        return TryAgain()
    if error.answer_code not in ("MOVED", "ASK") or error.__cause__ is None:
        return None
    words = (reply(error.__cause__) or "").split()
    if len(words) < 3 or not words[1].isdecimal():
        return None
    host, _, port = words[2].rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or (asked[0] if asked else "")
    if not host or not port.isdecimal():
        return None
    at = (host, int(port))
    return Moved(int(words[1]), at) if words[0] == "MOVED" else Ask(at)
