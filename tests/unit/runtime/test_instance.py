"""Instance records: their stored form, and refused records."""

from __future__ import annotations

import json

import pytest

from dynamo_redis.errors import SchemaMismatch
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.base import Target
from dynamo_redis.runtime.instance import Instance

NAME = EndpointName.parse("dynamo.backend.generate")
ID = InstanceId(7587888160958627806)


def record(**changes: object) -> bytes:
    """Return a record as Dynamo writes it, with `changes`."""
    fields = {
        "type": "Endpoint",
        "namespace": "dynamo",
        "component": "backend",
        "endpoint": "generate",
        "instance_id": ID,
        "transport": {"tcp": "10.0.0.7:37145/694d98147d54bfde/dynamo/backend/generate"},
    }
    return json.dumps({**fields, **changes}).encode()


def test_stored_record_reads_back_equal() -> None:
    instance = Instance(NAME, ID, {"tcp": f"[::1]:1/{NAME.subject(ID)}"}, True, b"\x01\x02", 12.5)
    assert Instance.from_bytes(instance.to_bytes()) == instance


def test_record_of_dynamo_is_read() -> None:
    instance = Instance.from_bytes(record(unknown_field=1))
    assert instance.target("tcp") == Target(
        ID, "10.0.0.7:37145", "694d98147d54bfde/dynamo/backend/generate", None
    )
    assert instance.target("http") is None
    assert (instance.ready, instance.transport.kind) == (True, "tcp")


def test_planes_have_the_names_of_the_setting() -> None:
    instance = Instance(NAME, ID, {"nats_tcp": f"dynamo.plane.x/{NAME.subject(ID)}", "tcp": "10.0.0.7:1/x"})
    assert instance.planes == "nats, tcp"
    assert instance.addresses == {"nats": "dynamo.plane.x", "tcp": "10.0.0.7:1"}


def test_stalled_form_differs_in_ready_only() -> None:
    instance = Instance.from_bytes(record())
    stalled = json.loads(instance.to_bytes(ready=False))
    assert {**stalled, "ready": True} == json.loads(instance.to_bytes())


def test_secret_is_not_in_the_repr() -> None:
    instance = Instance(NAME, ID, {"tcp": "h:1/s"}, secret=b"hush-hush")
    assert "hush" not in repr(instance)
    assert b"hush".hex() not in repr(instance)


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        record(transport={}),
        record(transport={"tcp": 5}),
        record(transport=None),
        record(instance_id="x"),
        record(secret="not hex"),
        record(namespace=""),
    ],
)
def test_invalid_record_is_a_value_error(stored: bytes) -> None:
    with pytest.raises(ValueError, match="not an instance record"):
        Instance.from_bytes(stored)


def test_unknown_major_version_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="version 2"):
        Instance.from_bytes(record(version=2))
