"""Runs `dynamo-redis` as a later minor release may be: `later_release.py COMMAND …`.

What it stores and sends has fields that the present release does not know: in each record of the registry, in
the registry's schema version, in manifests and snapshots, in batches of events and in the events, in bookings
and load, and in the handshake, where it offers a higher version and a feature.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Final

from dynamo_redis.cli.app import run
from dynamo_redis.decoding import VersionedModel
from dynamo_redis.router.index import snapshot
from dynamo_redis.runtime import barrier
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.ports import PortRecord
from dynamo_redis.store.objects.manifest import Manifest
from dynamo_redis.store.registry import scripts_api
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from tests.later_formats import LATER, later_batch, later_json

LATER_SCHEMA: Final = "1.1"
LATER_FEATURE: Final = 1 << 40


def extended(change: Callable[[Any], Any], encode: Callable[..., Any]) -> Any:
    """Return an encoder whose result is changed."""

    @wraps(encode)
    def encode_more(*arguments: Any, **options: Any) -> Any:
        return change(encode(*arguments, **options))

    return encode_more


def add_to_json(stored: bytes) -> bytes:
    """Add fields to a record in JSON."""
    return json.dumps(later_json(json.loads(stored))).encode()


def add_to_text(stored: str) -> str:
    """Add fields to a record in JSON."""
    return json.dumps(later_json(json.loads(stored)))


def add_to_manifest(fields: list[str | int]) -> list[str | int]:
    """Add a field, behind `version`, which has to be the first one."""
    return [*fields, "later", "x"]


def add_to_piece(encode: Callable[[Sequence[Any]], bytes]) -> Callable[[Sequence[Any]], bytes]:
    """Add a field to each piece of a snapshot but the last, which is known by having one."""

    @wraps(encode)
    def encode_more(fields: Sequence[Any]) -> bytes:
        return encode([*fields, LATER] if len(fields) > 1 else fields)

    return encode_more


def offer_more(side: type[Any], name: str, **more: int) -> None:
    """Have a side of the handshake offer more in its HELLO."""
    begin = side.__init__

    @wraps(begin)
    def begin_with_more(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        setattr(self, name, replace(getattr(self, name), features=LATER_FEATURE, **more))

    side.__init__ = begin_with_more


def become_later() -> None:
    """Change every encoder of this process."""
    VersionedModel.to_bytes = extended(add_to_json, VersionedModel.to_bytes)  # type: ignore[method-assign]
    Instance.to_bytes = extended(add_to_json, Instance.to_bytes)  # type: ignore[method-assign]
    PortRecord.model_dump_json = extended(add_to_text, PortRecord.model_dump_json)  # type: ignore[method-assign]
    barrier._encode = extended(add_to_json, barrier._encode)
    Manifest.fields = extended(add_to_manifest, Manifest.fields)  # type: ignore[method-assign]
    EventBatch.to_bytes = extended(later_batch, EventBatch.to_bytes)  # type: ignore[method-assign]
    EventBatch.of_packed = extended(later_batch, EventBatch.of_packed)  # type: ignore[method-assign]
    vars(snapshot)["_piece"] = add_to_piece(snapshot._piece)
    vars(scripts_api)["SCHEMA_VERSION"] = LATER_SCHEMA
    offer_more(ClientHandshake, "client", version=2)
    offer_more(ServerHandshake, "server")


if __name__ == "__main__":
    become_later()
    sys.exit(run())
