"""Parsers of the answers in which engines say where they publish their KV events. Pure.

- vLLM, `GET /kv_event_sources` (`vllm/entrypoints/serve/kv_events/api_router.py`): a list, or an object with
  the list as `sources`. Each entry is a data-parallel rank: `data_parallel_rank`, `endpoint`,
  `replay_endpoint` or null, `topic`. The ports are those of the rank. The list is empty if nothing is
  published.
- SGLang, `GET /server_info`: its `ServerArgs`. `kv_events_config` is the option's JSON text or null,
  `dp_size` the number of ranks. Newer versions add `kv_events` (`describe_kv_events_publisher`): the host and
  the port of rank 0, the topic, `block_size` and `dp_size`. Rank n publishes and replays at the port + n.

Endpoints are those that the engine binds. `tcp://*:5557` and `tcp://0.0.0.0:5557` are dialled at the engine's
host. The answers are not trusted: they cannot make a worker connect to any other host.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from ipaddress import ip_address
from typing import Any, Final

from dynamo_redis.events.engine_zmq.wire import EventSource

MAX_RANKS: Final = 1024
MAX_ANSWER_BYTES: Final = 1 << 20
_MAX_TEXT: Final = 256
_WILDCARDS: Final = ("*", "0.0.0.0", "::")  # noqa: S104 - compared, not bound


class Hosts:
    """The hosts at which an engine's events may be dialled."""

    def __init__(self, host: str, addresses: Collection[str] = (), *, allow_all: bool = False) -> None:
        """Take the engine's host as its URL has it, and the addresses that this name has now."""
        self.host = host
        self._own = {host.lower(), *addresses}
        self._allow_all = allow_all

    def dialled(self, endpoint: str, rank: int = 0) -> str:
        """Return the address to dial for an endpoint that the engine binds, its port plus `rank`.

        Raises ValueError if it is not a TCP endpoint at this engine's host.
        """
        scheme, separator, rest = endpoint.partition("://")
        host, colon, port_text = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if scheme != "tcp" or not (separator and colon and host):
            raise ValueError(f"{endpoint!r} is not tcp://host:port")
        if not (port_text.isascii() and port_text.isdecimal() and len(port_text) <= 5):
            raise ValueError(f"{endpoint!r} has no port")
        port = int(port_text) + rank
        if not (int(port_text) and port < 1 << 16):
            raise ValueError(f"{endpoint!r} has no port for rank {rank}")
        if host in _WILDCARDS:
            host = self.host
        elif not (self._allow_all or self._is_own(host)):
            raise ValueError(
                f"{endpoint!r} is not at the engine's host, {self.host}; "
                "DYN_KV_EVENTS_DISCOVERY=any (--kv-events-discovery) allows it"
            )
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def _is_own(self, host: str) -> bool:
        if host.lower() in self._own:
            return True
        return _is_loopback(host) and any(_is_loopback(own) for own in self._own)


def read_vllm_sources(content: bytes, hosts: Hosts) -> list[EventSource]:
    """Return the sources of an answer to `/kv_event_sources`, by rank; empty if nothing is published.

    Raises ValueError for any other answer.
    """
    answer = _parsed(content)
    listed = answer.get("sources") if isinstance(answer, dict) else answer
    if not isinstance(listed, list):
        raise ValueError("it is no list of sources")
    if len(listed) > MAX_RANKS:
        raise ValueError(f"it has {len(listed)} sources; {MAX_RANKS} is the most")
    by_rank: dict[int, EventSource] = {}
    for entry in listed:
        if not isinstance(entry, dict):
            raise ValueError("a source is no object")
        rank = entry.get("data_parallel_rank")
        if type(rank) is not int or not 0 <= rank < 1 << 16 or rank in by_rank:
            raise ValueError(f"data_parallel_rank {str(rank)[:32]} is no rank, or is there twice")
        by_rank[rank] = _source(entry, hosts)
    ranks = sorted(by_rank)
    if len(ranks) > 1 and ranks != list(range(len(ranks))):  # a single rank may have any number
        raise ValueError(f"its {len(ranks)} ranks do not have the numbers from 0 on")
    return [by_rank[rank] for rank in ranks]


def read_sglang_sources(content: bytes, hosts: Hosts) -> list[EventSource]:
    """Return the sources of an answer to `/server_info`, by rank; empty if nothing is published.

    Raises ValueError for any other answer.
    """
    answer = _parsed(content)
    if not isinstance(answer, dict):
        raise ValueError("it is no object")
    config = answer.get("kv_events_config")
    if isinstance(config, str) and config:
        config = _parsed(config.encode("utf-8", "replace"))
    if config is not None and config != "" and not isinstance(config, dict):
        raise ValueError("kv_events_config is no object")
    rank_count = answer.get("dp_size", 1)
    described = answer.get("kv_events")
    if isinstance(described, dict):
        rank_count = described.get("dp_size", rank_count)
        endpoint = f"tcp://{described.get('endpoint_host')}:{described.get('endpoint_port_base')}"
        config = {**(config or {}), **described, "endpoint": endpoint}
    if not config or config.get("publisher") != "zmq":
        return []
    if type(rank_count) is not int or not 1 <= rank_count <= MAX_RANKS:
        raise ValueError(f"dp_size {str(rank_count)[:32]} is no number of ranks up to {MAX_RANKS}")
    config = {"endpoint": "tcp://*:5557", **config}
    return [_source(config, hosts, rank) for rank in range(rank_count)]


def _source(entry: Mapping[str, Any], hosts: Hosts, rank: int = 0) -> EventSource:
    replay_endpoint = _text(entry, "replay_endpoint")
    return EventSource(
        hosts.dialled(_text(entry, "endpoint") or "", rank),
        hosts.dialled(replay_endpoint, rank) if replay_endpoint else None,
        _text(entry, "topic") or "",
    )


def _text(entry: Mapping[str, Any], name: str) -> str | None:
    value = entry.get(name)
    if value is not None and (
        not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable()
    ):
        raise ValueError(f"{name} is no text of at most {_MAX_TEXT} characters")
    return value


def _parsed(content: bytes) -> Any:
    if len(content) > MAX_ANSWER_BYTES:
        raise ValueError(f"it has more than {MAX_ANSWER_BYTES} bytes")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
