"""Reading of engines' answers about their KV events: the engines' own ones, and hostile ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_redis.engines.openai.event_sources import (
    MAX_ANSWER_BYTES,
    MAX_RANKS,
    Hosts,
    read_sglang_sources,
    read_vllm_sources,
)
from dynamo_redis.engines.openai.models import ServerDetails, read_details
from dynamo_redis.events.engine_zmq.wire import EventSource

GOLDEN: Final = json.loads((Path(__file__).parents[3] / "vectors" / "kv_event_answers.json").read_text())
HOSTS: Final = Hosts("engine", {"10.0.0.1"})


def content(answer: object) -> bytes:
    return json.dumps(answer).encode()


def golden(name: str) -> bytes:
    return content(GOLDEN[name]["answer"])


def source(**fields: Any) -> dict[str, Any]:
    return {
        "data_parallel_rank": 0,
        "endpoint": "tcp://*:5557",
        "replay_endpoint": None,
        "topic": "",
    } | fields


def sglang(**fields: Any) -> bytes:
    config = {"publisher": "zmq", "endpoint": "tcp://*:5557"}
    return content({"dp_size": 1, "kv_events_config": json.dumps(config)} | fields)


def test_answers_of_the_engines_are_read() -> None:
    assert read_vllm_sources(golden("vllm"), HOSTS) == [EventSource("tcp://10.0.0.1:5557")]
    assert read_vllm_sources(golden("vllm_object"), HOSTS) == [
        EventSource("tcp://engine:41001", "tcp://engine:41003", "kv-events"),
        EventSource("tcp://engine:41002", None, "kv-events"),
    ]
    assert read_sglang_sources(golden("sglang"), HOSTS) == [
        EventSource("tcp://engine:5557", "tcp://engine:5657", "kv-events"),
        EventSource("tcp://engine:5558", "tcp://engine:5658", "kv-events"),
    ]
    assert read_sglang_sources(golden("sglang_described"), HOSTS) == [
        EventSource("tcp://engine:5557", None, "kv"),
        EventSource("tcp://engine:5558", None, "kv"),
    ]
    assert read_details(golden("sglang_described")) == ServerDetails(None, 128)
    assert read_details(golden("sglang")) == ServerDetails(None, 16)


def test_engines_without_events_have_no_sources() -> None:
    assert read_vllm_sources(b"[]", HOSTS) == []
    assert read_vllm_sources(b'{"sources": []}', HOSTS) == []
    assert read_sglang_sources(b"{}", HOSTS) == []
    for config in (None, "", '{"publisher": "null"}', '{"endpoint": "tcp://*:5557"}'):
        assert read_sglang_sources(sglang(kv_events_config=config), HOSTS) == []


def test_single_rank_may_have_any_number() -> None:
    """Of an engine with external load balancing, whose every rank is a server of its own."""
    assert len(read_vllm_sources(content([source(data_parallel_rank=3)]), HOSTS)) == 1


@pytest.mark.parametrize(
    ("endpoint", "dialled"),
    [
        ("tcp://*:5557", "tcp://[::1]:5557"),
        ("tcp://[::]:5557", "tcp://[::1]:5557"),
        ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5557"),
        ("tcp://localhost:5557", "tcp://localhost:5557"),
        ("tcp://[::1]:5557", "tcp://[::1]:5557"),
    ],
)
def test_loopback_is_one_host(endpoint: str, dialled: str) -> None:
    assert Hosts("::1").dialled(endpoint) == dialled


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "tcp://*",
        "tcp://*:",
        "tcp://*:0",
        "tcp://*:65536",
        "tcp://*:-1",
        "tcp://*:٣",
        "tcp://*:5557/x",
        "tcp://:5557",
        "ipc:///tmp/events",
        "inproc://cache",
        "udp://*:5557",
        "tcp://10.0.0.2:5557",
        "tcp://169.254.169.254:80",
        "tcp://127.0.0.1:6379",  # of the worker's own host, not of the engine's
        "tcp://engine.evil:5557",
        "tcp://eth0;engine:5557",
    ],
)
@pytest.mark.parametrize("field", ["endpoint", "replay_endpoint"])
def test_endpoints_elsewhere_are_refused(field: str, endpoint: str) -> None:
    if field == "replay_endpoint" and not endpoint:
        return  # the same as null
    with pytest.raises(ValueError, match=r"host|port"):
        read_vllm_sources(content([source(**{field: endpoint})]), HOSTS)
    config = json.dumps({"publisher": "zmq", field: endpoint})
    with pytest.raises(ValueError, match=r"host|port"):
        read_sglang_sources(sglang(kv_events_config=config), HOSTS)


def test_another_host_can_be_allowed() -> None:
    hosts = Hosts("engine", allow_all=True)
    (found,) = read_vllm_sources(content([source(endpoint="tcp://10.0.0.2:5557")]), hosts)
    assert found.endpoint == "tcp://10.0.0.2:5557"


@pytest.mark.parametrize(
    "answer",
    [
        None,
        3,
        "tcp://*:5557",
        {},
        {"sources": {}},
        [3],
        [source(data_parallel_rank=None)],
        [source(data_parallel_rank=True)],
        [source(data_parallel_rank=-1)],
        [source(data_parallel_rank=1 << 70)],
        [source(), source()],
        [source(), source(data_parallel_rank=2)],
        [source(endpoint=5557)],
        [source(endpoint="tcp://*:5557" + "0" * 300)],
        [source(topic=["kv"])],
        [source(topic="x" * 1000)],
        [source(topic="a\nb")],
        [source(data_parallel_rank=rank) for rank in range(MAX_RANKS + 1)],
    ],
)
def test_other_answers_of_vllm_are_refused(answer: object) -> None:
    with pytest.raises(ValueError):
        read_vllm_sources(content(answer), HOSTS)


@pytest.mark.parametrize(
    "fields",
    [
        {"dp_size": 0},
        {"dp_size": "2"},
        {"dp_size": True},
        {"dp_size": 1 << 40},
        {"dp_size": 1024, "kv_events_config": '{"publisher": "zmq", "endpoint": "tcp://*:65000"}'},
        {"kv_events_config": "not JSON"},
        {"kv_events_config": "[" * 100_000},
        {"kv_events_config": "3"},
        {"kv_events_config": ["zmq"]},
        {"kv_events": {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": "x"}},
        {"kv_events": {"publisher": "zmq"}},
    ],
)
def test_other_answers_of_sglang_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        read_sglang_sources(sglang(**fields), HOSTS)


@pytest.mark.parametrize("read", [read_vllm_sources, read_sglang_sources])
@pytest.mark.parametrize(
    "answer", [b"", b"<html>", b"\xff\xfe", b"[" * 200_000, b" " * (MAX_ANSWER_BYTES + 1)]
)
def test_what_is_no_json_is_refused(read: Any, answer: bytes) -> None:
    with pytest.raises(ValueError):
        read(answer, HOSTS)


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: JSON | st.just("tcp://*:5557")
            for name in (
                "data_parallel_rank",
                "endpoint",
                "replay_endpoint",
                "topic",
                "kv_events_config",
                "kv_events",
                "dp_size",
            )
        },
    )
    | JSON
)
def test_any_answer_is_read_or_refused(answer: object) -> None:
    for read, one in ((read_vllm_sources, [answer]), (read_sglang_sources, answer)):
        try:
            found = read(content(one), HOSTS)
        except ValueError:
            continue
        for each in found:
            assert each.endpoint.startswith(("tcp://engine:", "tcp://10.0.0.1:"))
