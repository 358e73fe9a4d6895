"""Makes tests/vectors/formats.json: each stored or sent format as the last release writes it.

    python -m tools.golden_formats           # prints which formats are written otherwise now
    python -m tools.golden_formats --write   # at a release: adds new formats, and rewrites changed ones

Tests read the file with the present decoders, also with the fields that a later minor version may add, and
compare what is written now with it. A format whose golden form has to change in another way than by more
fields is another major version.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgpack

from dynamo_redis.events.router_record import RouterRecord
from dynamo_redis.frontend.busy import ThresholdRecord
from dynamo_redis.frontend.record import FrontendRecord
from dynamo_redis.models.card import FileReference, ModelCard, RuntimeConfig
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.router.base import Matched, Worker, WorkerChoice
from dynamo_redis.router.choice.booking import Booking
from dynamo_redis.router.choice.booking_messages import (
    RemoteBooking,
    active_messages,
    add_message,
    read_booking,
)
from dynamo_redis.runtime import barrier
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.ports import PortRecord
from dynamo_redis.store.base import Record
from dynamo_redis.store.objects.manifest import Manifest
from dynamo_redis.store.registry.change_log import Change, parse_change, parse_record
from dynamo_redis.wire import kv_event
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.kv_event import read_kv_events
from dynamo_redis.wire.topics import ACTIVE_SEQUENCES, KV_EVENTS, KV_METRICS

PATH: Final = Path(__file__).parents[1] / "tests" / "vectors" / "formats.json"

ENDPOINT: Final = EndpointName("dynamo", "backend", "generate")
ID: Final = InstanceId(7587888160958627806)
PUBLISHER: Final = PublisherId(ID, 6, 1)
NAMES: Final = bytes(range(16))
DIGEST: Final = "5e" * 32


@dataclass(frozen=True)
class Format:
    """One format: a sample as it is written now, and what the present decoder reads from bytes.

    `version_at` is the place of its major version: a name in JSON, an index in msgpack; None if it has none
    of its own, since the schema version of the registry or the stream counts for it.
    """

    kind: Literal["json", "msgpack"]
    encode: Callable[[], bytes]
    decode: Callable[[bytes], Any]
    version_at: str | int | None = None


def _manifest() -> Manifest:
    return Manifest("0badcafe", 5, DIGEST, 1 << 20, (DIGEST,), 1_700_000_000_000)


def _read_manifest(packed: bytes) -> Manifest:
    return Manifest.of_fields(msgpack.unpackb(packed, raw=True), "redis-object://b/n")


def _pack_manifest() -> bytes:
    fields = [*_manifest().fields(), "created_at_ms", 1_700_000_000_000]
    return bytes(msgpack.packb([str(field).encode() for field in fields]))


def _read_events(packed: bytes) -> Any:
    batch = EventBatch.from_bytes(packed)
    return batch.topic, batch.publisher, batch.next_sequence, read_kv_events(batch.events)


def _read_bookings(packed: bytes) -> list[Any]:
    """Read messages of bookings as `BookingSync.apply` does."""
    found: list[Any] = []
    for event in EventBatch.from_bytes(packed).events:
        match event:
            case ["add", *described]:
                found.append(read_booking(described))
            case ["prefill_done" | "free" as what, str(request_id), *_]:
                found.append((what, request_id))
            case ["active", list(active), *_]:
                before: RemoteBooking | None = None
                for one in active:
                    before = read_booking(one, before.names if before else b"")
                    found.append(before)
    return found


def _read_record(packed: bytes) -> Record | None:
    return parse_record("v1/ports/h/1", packed)


def _read_change(packed: bytes) -> Change:
    return parse_change(b"1700000000000-1", msgpack.unpackb(packed, raw=True))


def _batch(topic: str, events: list[Any]) -> bytes:
    return EventBatch(topic, PUBLISHER, 41, 1_700_000_000_000, events).to_bytes()


_KV_EVENTS: Final = [
    event.to_wire()
    for event in (
        kv_event.stored([1, 2**64 - 1]),
        kv_event.removed([3], kv_event.HOST, inside=True),
        kv_event.removed([4], kv_event.DISK),
        kv_event.cleared(),
    )
]


def _booking(
    request_id: str, dp_rank: int, prefill_tokens: int, blocks: int, left_s: float, names: bytes
) -> Booking:
    choice = WorkerChoice(Worker(ID, dp_rank), Matched(0), 0.0)
    return Booking(request_id, choice, prefill_tokens, blocks, left_s, names)


_FIRST: Final = _booking("r-1", 1, 512, 33, 119.5, NAMES)
_SECOND: Final = _booking("r-2", 1, 0, 2, 3.0, NAMES[:8] + b"\x09" * 8)
_BOOKINGS: Final[list[Any]] = [
    add_message(_FIRST, 0.0),
    ["prefill_done", "r-1"],
    ["free", "r-1"],
    *active_messages([_FIRST, _SECOND], 0.0),
]
_LOAD: Final = {"worker_stats": {"request_active_slots": 3}, "kv_stats": {"kv_active_blocks": 70}}
_CHANGE: Final = [
    *(b"o", b"p", b"k", b"v1/ports/h/1", b"v", b"value", b"l", b"694d98147d54bfde", b"c", b""),
    *(b"n", b"1", b"w", b"0a", b"p", b"1700000000000-0", b"q", b"09"),
]

FORMATS: Final[dict[str, Format]] = {
    "instance record": Format(
        "json",
        Instance(ENDPOINT, ID, {"tcp": f"h:1/{ENDPOINT.subject(ID)}"}, True, b"\x01" * 32, 12.5).to_bytes,
        Instance.from_bytes,
        "version",
    ),
    "model card": Format(
        "json",
        ModelCard(
            display_name="Qwen/Qwen3-0.6B",
            slug="qwen_qwen3-0_6b",
            context_length=40960,
            kv_cache_block_size=16,
            runtime_config=RuntimeConfig(total_kv_blocks=1000, data_parallel_size=2, modalities=["image"]),
            files={"tokenizer.json": FileReference(url="redis-object://b/n", sha256=DIGEST, size_bytes=5)},
        ).to_bytes,
        ModelCard.from_bytes,
        "version",
    ),
    "router record": Format(
        "json",
        RouterRecord(
            namespace="dynamo",
            component="backend",
            router_id="5-a",
            instance_id=ID,
            consumer_group="5-a",
            settings={"router_temperature": 0.0},
            started_at=12.5,
        ).to_bytes,
        RouterRecord.from_bytes,
        "version",
    ),
    "frontend record": Format(
        "json",
        FrontendRecord(instance_id=ID, http_url="http://h:8000", router_mode="kv", started_at=12.5).to_bytes,
        FrontendRecord.from_bytes,
        "version",
    ),
    "busy thresholds": Format(
        "json",
        ThresholdRecord(model="demo", active_decode_blocks_threshold=0.9).to_bytes,
        ThresholdRecord.from_bytes,
        "version",
    ),
    "port record": Format(
        "json",
        lambda: PortRecord(worker_id="w", reason="nccl", reserved_at=12.5, pid=7).model_dump_json().encode(),
        PortRecord.model_validate_json,
    ),
    "barrier: the leader's data": Format(
        "json", lambda: barrier._encode("0a", {"data": {"port": 1}}), barrier._decode
    ),
    "barrier: a worker": Format("json", lambda: barrier._encode("0a", {"token": "0b"}), barrier._decode),
    "barrier: complete": Format(
        "json", lambda: barrier._encode("0a", {"workers": {"w": "0b"}}), barrier._decode
    ),
    "registry record": Format(
        "msgpack",
        lambda: bytes(
            msgpack.packb([b"1700000000000-1", b"1700000000000-0", 2, b"694d98147d54bfde", b"value"])
        ),
        _read_record,
    ),
    "entry of the change log": Format("msgpack", lambda: bytes(msgpack.packb(_CHANGE)), _read_change),
    "manifest of an object": Format("msgpack", _pack_manifest, _read_manifest),
    "KV events": Format("msgpack", lambda: _batch(KV_EVENTS, _KV_EVENTS), _read_events, 0),
    "bookings": Format("msgpack", lambda: _batch(ACTIVE_SEQUENCES, _BOOKINGS), _read_bookings, 0),
    "load": Format("msgpack", lambda: _batch(KV_METRICS, [_LOAD]), EventBatch.from_bytes, 0),
}
"""The formats whose bytes one function writes. Those of connections and snapshots are beside the golden file,
the golden file, have those of the wire and of the routers' snapshots."""


def golden() -> dict[str, bytes]:
    """Return the golden form of each format."""
    stored = json.loads(PATH.read_text("utf-8"))["formats"]
    return {
        name: form["text"].encode() if "text" in form else bytes.fromhex(form["hex"])
        for name, form in stored.items()
    }


def written() -> dict[str, bytes]:
    """Return the form of each format as it is written now."""
    return {name: each.encode() for name, each in FORMATS.items()}


def _form(name: str, content: bytes) -> dict[str, str]:
    return {"text": content.decode()} if FORMATS[name].kind == "json" else {"hex": content.hex()}


def main() -> int:
    """Write the file, or print the differences. Return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="tools.golden_formats", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the file as of now")
    now = written()
    if parser.parse_args().write:
        forms = {name: _form(name, content) for name, content in now.items()}
        origin = "Written by the first release; a release may only add fields, with tools.golden_formats."
        PATH.write_text(json.dumps({"origin": origin, "formats": forms}, indent=1) + "\n", "utf-8")
        return 0
    last = golden()
    changed = sorted(name for name in now.keys() | last.keys() if now.get(name) != last.get(name))
    for name in changed:
        print(f"{name}\n  golden: {last.get(name)!r}\n  now:    {now.get(name)!r}")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
