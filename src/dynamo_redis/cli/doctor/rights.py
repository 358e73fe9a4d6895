"""The rights of a user, compared with those that each role needs.

`ACL DRYRUN` answers that without doing anything. Where it is not known (before Redis 7.0) or not permitted,
each command is sent in a form that changes nothing: to a key that does not exist, or with a value that is
refused after the rights were checked. Three commands have no such form: what they write is removed with the
next command.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any, Final

from dynamo_redis.cli.doctor.questions import Questions
from dynamo_redis.cli.roles import ROLES, Role, channel_pattern, examples, parts_of
from dynamo_redis.errors import StoreError

_NO_HASH: Final = "0" * 40

HARMLESS: Final = {
    "ping": "PING",
    "info": "INFO server",
    "role": "ROLE",
    "cluster|slots": "CLUSTER SLOTS",
    "asking": "ASKING",
    "client|setname": "CLIENT SETNAME dynamo-redis-doctor",
    "type": "TYPE KEY",
    "eval": "EVAL return(0) 1 KEY",
    "evalsha": f"EVALSHA {_NO_HASH} 1 KEY",
    "time": "TIME",
    "multi": "MULTI",
    "exec": "EXEC",
    "exists": "EXISTS KEY",
    "get": "GET KEY",
    "set": "SET KEY v XX",
    "strlen": "STRLEN KEY",
    "del": "DEL KEY",
    "unlink": "UNLINK KEY",
    "persist": "PERSIST KEY",
    "expire": "EXPIRE KEY 1",
    "pexpire": "PEXPIRE KEY 1",
    "pttl": "PTTL KEY",
    "hget": "HGET KEY f",
    "hmget": "HMGET KEY f",
    "hgetall": "HGETALL KEY",
    "hset": "HSET KEY f v f",
    "hdel": "HDEL KEY f",
    "hstrlen": "HSTRLEN KEY f",
    "hincrby": "HINCRBY KEY f x",
    "sadd": "SADD KEY m",
    "srem": "SREM KEY m",
    "sismember": "SISMEMBER KEY m",
    "smembers": "SMEMBERS KEY",
    "zadd": "ZADD KEY x m",
    "zrem": "ZREM KEY m",
    "zscore": "ZSCORE KEY m",
    "zcard": "ZCARD KEY",
    "zcount": "ZCOUNT KEY 0 1",
    "zrange": "ZRANGE KEY 0 0",
    "zrangebylex": "ZRANGEBYLEX KEY - +",
    "zrangebyscore": "ZRANGEBYSCORE KEY 0 1",
    "zscan": "ZSCAN KEY 0",
    "scan": "SCAN 0 MATCH KEY COUNT 1",
    "llen": "LLEN KEY",
    "lrange": "LRANGE KEY 0 0",
    "ltrim": "LTRIM KEY 1 0",
    "lpush": "LPUSH KEY v",
    "rpush": "RPUSH KEY v",
    "xadd": "XADD KEY NOMKSTREAM * f v",
    "xdel": "XDEL KEY 1-1",
    "xlen": "XLEN KEY",
    "xrange": "XRANGE KEY - + COUNT 1",
    "xrevrange": "XREVRANGE KEY + - COUNT 1",
    "xread": "XREAD COUNT 1 STREAMS KEY 0",
    "xreadgroup": "XREADGROUP GROUP g c COUNT 1 STREAMS KEY >",
    "xack": "XACK KEY g 1-1",
    "xpending": "XPENDING KEY g",
    "xtrim": "XTRIM KEY MAXLEN 0",
    "xgroup|create": "XGROUP CREATE KEY g 0",
    "xgroup|destroy": "XGROUP DESTROY KEY g",
    "xinfo|groups": "XINFO GROUPS KEY",
    "xinfo|stream": "XINFO STREAM KEY",
    "publish": "PUBLISH CHANNEL x",
    "subscribe": "SUBSCRIBE CHANNEL",
    "psubscribe": "PSUBSCRIBE CHANNEL",
}
"""For each command of a role a form of it that changes nothing. KEY does not exist."""

REMOVED_BY: Final = {"sadd": "PEXPIRE KEY 0", "lpush": "LTRIM KEY 1 0", "rpush": "LTRIM KEY 1 0"}
"""The commands that write all the same, to a key of their own, and the ones that remove it at once."""

OPTIONAL: Final = ("info", "client|setname", "type")
"""Commands of the rules that processes can do without: they serve checks and messages."""

_LAST: Final = ("subscribe", "psubscribe")
"""Commands after which a connection takes no others."""

Need = tuple[str, str]
"""A command, and the key or channel that it is sent to."""


async def missing_rights(
    questions: Questions, user: str, prefix: str, unused: Collection[str]
) -> dict[Role, list[str]]:
    """Return for each role the commands, with their keys, that the user may not send. `unused` are commands
    that are not needed at this server."""
    name = f"doctor-{secrets.token_hex(8)}"
    needs = {
        role: [need for need in _needs(role, prefix, name) if need[0] not in (*unused, *OPTIONAL)]
        for role in ROLES
    }
    every = sorted({need for found in needs.values() for need in found}, key=lambda need: need[0] in _LAST)
    refused = await _dry_run(questions, user, every)
    if refused is None:
        refused = await _do(questions, every)
    return {role: [_shown(need, name) for need in found if need in refused] for role, found in needs.items()}


def _needs(role: Role, prefix: str, name: str) -> list[Need]:
    found: dict[Need, None] = {}
    for part in parts_of(role):
        for command, key in examples(part, prefix, name):
            if command in ("subscribe", "publish", "psubscribe"):
                continue
            found[command, key if "KEY" in HARMLESS[command] and command != "scan" else ""] = None
        for pattern in part.channels:
            channel = channel_pattern(pattern, prefix)
            if pattern == "LEASES":
                found["psubscribe", channel] = None
                continue
            example = pattern.replace("*", name).replace("@", prefix)
            for command in ("subscribe", "publish"):
                if command in part.commands:
                    found[command, example] = None
    return list(found)


def _command(form: str, target: str) -> list[str]:
    return [target if word in ("KEY", "CHANNEL") else word for word in form.split()]


def _shown(need: Need, name: str) -> str:
    command, target = need
    return f"{command} {target.replace(name, '*')}".strip()


async def _dry_run(questions: Questions, user: str, needs: list[Need]) -> set[Need] | None:
    """Return the refused ones, by `ACL DRYRUN`; None if the server does not answer that."""
    commands = [("ACL", "DRYRUN", user, *_command(HARMLESS[need[0]], need[1])) for need in needs]
    (first,) = await questions.ask(commands[:1])
    if isinstance(first, StoreError):
        return None
    answers = await questions.ask(commands)
    return {need for need, answer in zip(needs, answers, strict=True) if answer != b"OK"}


async def _do(questions: Questions, needs: list[Need]) -> set[Need]:
    """Return the refused ones, by sending each."""
    commands: list[list[str]] = []
    keys: list[str] = []
    places: list[int] = []

    def send(command: list[str], key: str = "") -> None:
        commands.append(command)
        keys.append(key)

    for command, target in needs:
        if command == "multi":
            continue
        if command == "exec":
            send(["MULTI"])
        places.append(len(commands))
        if command in REMOVED_BY:
            target = f"{target}-{command}"
        key = target if "KEY" in HARMLESS[command] else ""
        send(_command(HARMLESS[command], target), key)
        if command in REMOVED_BY:
            send(_command(REMOVED_BY[command], target), key)
    answers = await questions.ask(commands, keys)
    await questions.aclose()  # it is a subscriber now
    sent = [need for need in needs if need[0] != "multi"]
    return {need for need, place in zip(sent, places, strict=True) if _is_refusal(answers[place])}


def _is_refusal(answer: Any) -> bool:
    """Return whether a command is not permitted, not known, or ends the connection, as at some proxies."""
    return isinstance(answer, StoreError) and (
        not answer.answered or answer.answer_code == "NOPERM" or "unknown command" in str(answer).lower()
    )
