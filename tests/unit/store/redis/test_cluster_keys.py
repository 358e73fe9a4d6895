"""The node of a command, and the answers of nodes that are not the one."""

from __future__ import annotations

import pytest
from redis.crc import key_slot

from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.store.redis.blocking import Argument
from dynamo_redis.store.redis.cluster.redirects import Ask, Moved, Redirect, TryAgain, redirect_of
from dynamo_redis.store.redis.cluster.slots import key_of, slot_of_key
from dynamo_redis.store.redis.server_errors import ErrorReply


@pytest.mark.parametrize(
    "key",
    ["", "a", "{a}b", "x{a}b", "{}a", "{a", "a}b{c}", "{{a}}", "ключ", "{ключ}:1", b"\xff{a}", b"\xff", 7],
)
def test_a_keys_slot_is_that_of_redis(key: Argument) -> None:
    assert slot_of_key(key) == key_slot(key if isinstance(key, bytes) else str(key).encode())


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("GET", "k"), "k"),
        (("get", "k"), "k"),
        (("XREAD", "COUNT", 1, "BLOCK", 5, "STREAMS", "k", "0-0"), "k"),
        (("XREADGROUP", "GROUP", "streams", "c", "STREAMS", "k", ">"), "k"),
        (("XINFO", "STREAM", "k"), "k"),
        (("XGROUP", "DESTROY", "k", "g"), "k"),
        (("EVAL", "source", 1, "k", "a"), "k"),
        (("PUBLISH", "channel", "m"), "channel"),
        (("TIME",), None),
        (("INFO", "server"), None),
        (("CONFIG", "GET", "x"), None),
    ],
)
def test_the_first_key_of_a_command_is_found(command: tuple[Argument, ...], key: str | None) -> None:
    assert key_of(command) == key


@pytest.mark.parametrize(
    ("text", "redirect"),
    [
        ("MOVED 7 10.0.0.1:6379", Moved(7, ("10.0.0.1", 6379))),
        ("MOVED 7 node-1.example:6379", Moved(7, ("node-1.example", 6379))),
        ("MOVED 7 fd00::1:6379", Moved(7, ("fd00::1", 6379))),
        ("MOVED 7 :6380", Moved(7, ("asked", 6380))),
        ("ASK 7 10.0.0.1:6379", Ask(("10.0.0.1", 6379))),
        ("TRYAGAIN Multiple keys request during rehashing of slot", TryAgain()),
        ("MOVED 7", None),
        ("MOVED x 10.0.0.1:6379", None),
        ("MOVED 7 10.0.0.1", None),
        ("CLUSTERDOWN The cluster is down", None),
    ],
)
def test_redirects_are_read(text: str, redirect: Redirect | None) -> None:
    error = StoreUnavailable("refused")
    error.answer_code = text.split()[0]
    error.__cause__ = ErrorReply(text)
    assert redirect_of(error, ("asked", 6379)) == redirect
