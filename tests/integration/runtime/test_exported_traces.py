"""The export of traces to a collector: one that takes them, one that is away, one that never answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from dynamo_redis.config import TracingSettings
from dynamo_redis.errors import ConfigError
from tests.processes import PROGRAMS

END_S = 120.0
"""Far below the time that the exporter itself would take to give up, `EXPORTER_S`."""
EXPORTER_S = "1000"
ASKED_COUNT = 300


class Collector(ThreadingHTTPServer):
    """Takes traces."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.requests: list[ExportTraceServiceRequest] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Take(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(ExportTraceServiceRequest.FromString(content))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run_service(url: str, redis_url: str, prefix: str, **environment: str) -> str:
    """Run the traced service to its end; return what it logged."""
    environment = {
        "DYN_REDIS_URL": redis_url,
        "DYN_REDIS_PREFIX": prefix,
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "traced_service.py"), str(ASKED_COUNT)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=END_S,
    )
    assert (done.returncode, done.stdout) == (0, "all answered\n"), done.stderr
    return done.stderr


def test_collector_gets_all_spans_at_the_end(
    collector: Collector, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    run_service(
        collector.url, dynamo_redis_url, dynamo_redis_prefix, OTEL_RESOURCE_ATTRIBUTES="deployment=test"
    )
    resources = [resource for request in collector.requests for resource in request.resource_spans]
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["dynamo.traced.count"] * ASKED_COUNT
    told = {pair.key: pair.value.string_value for pair in resources[0].resource.attributes}
    assert (told["service.name"], told["deployment"]) == ("dynamo-worker", "test")
    assert int(told["service.instance.id"], 16)


def test_names_of_the_environment_count(
    collector: Collector, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    given = {"service.name": "mine", "service.instance.id": "pod-7"}
    attributes = ",".join(f"{name}={value}" for name, value in given.items())
    run_service(collector.url, dynamo_redis_url, dynamo_redis_prefix, OTEL_RESOURCE_ATTRIBUTES=attributes)
    resource = collector.requests[0].resource_spans[0].resource
    told = {pair.key: pair.value.string_value for pair in resource.attributes}
    assert given.items() <= told.items()


def test_sampler_of_the_environment_counts(
    collector: Collector, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    run_service(collector.url, dynamo_redis_url, dynamo_redis_prefix, OTEL_TRACES_SAMPLER="always_off")
    assert not collector.requests


def test_console_leaves_stdout_to_the_program(dynamo_redis_url: str, dynamo_redis_prefix: str) -> None:
    shown = run_service("", dynamo_redis_url, dynamo_redis_prefix, OTEL_TRACES_EXPORTER="console")
    assert shown.count('"name": "dynamo.traced.count"') == ASKED_COUNT


def test_traces_go_to_several_exporters(
    collector: Collector, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    shown = run_service(
        collector.url, dynamo_redis_url, dynamo_redis_prefix, OTEL_TRACES_EXPORTER="otlp,console"
    )
    assert shown.count('"name": "dynamo.traced.count"') == ASKED_COUNT
    assert collector.requests


@pytest.mark.parametrize("value", ["zipkin", "otlp,none", "otlp,", ",", "otlp;console"])
def test_unknown_exporters_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", value)
    with pytest.raises(ConfigError, match="OTEL_TRACES_EXPORTER"):
        TracingSettings.load()


def test_collector_that_is_away_stalls_nothing(dynamo_redis_url: str, dynamo_redis_prefix: str) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and never listens
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        logged = run_service(
            url,
            dynamo_redis_url,
            dynamo_redis_prefix,
            OTEL_BSP_SCHEDULE_DELAY="10",
            OTEL_BSP_MAX_QUEUE_SIZE="16",
            OTEL_BSP_MAX_EXPORT_BATCH_SIZE="8",
        )
    assert logged.count("opentelemetry") == 0
    assert logged.count("spans are lost") <= 1


def test_silent_collector_delays_no_end(dynamo_redis_url: str, dynamo_redis_prefix: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run_service(
            url,
            dynamo_redis_url,
            dynamo_redis_prefix,
            OTEL_EXPORTER_OTLP_TIMEOUT=EXPORTER_S,
            OTEL_BSP_SCHEDULE_DELAY="10",
        )


def test_missing_packages_are_named(dynamo_redis_url: str) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "without_extras.py"), "router", "--redis-url", dynamo_redis_url],
        env={**os.environ, "OTEL_TRACES_EXPORTER": "otlp"},
        capture_output=True,
        text=True,
        timeout=END_S,
    )
    assert done.returncode == 2
    assert "pip install 'dynamo-redis[otel]'" in done.stderr


@pytest.mark.parametrize(
    ("environment", "exporters", "url"),
    [
        ({}, [], None),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ["otlp"], None),
        ({"OTEL_TRACES_EXPORTER": "console"}, ["console"], None),
        ({"OTEL_TRACES_EXPORTER": "otlp,console"}, ["otlp", "console"], None),
        ({"OTEL_TRACES_EXPORTER": " console, otlp,otlp"}, ["console", "otlp"], None),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, [], None),
        ({"OTEL_EXPORT_ENABLED": "1"}, ["otlp"], None),
        ({"OTEL_EXPORT_ENABLED": "false", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, [], None),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, [], None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, ["otlp"], "http://c:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x"}, ["otlp"], "http://c/x"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            ["otlp"],
            "http://c:4317",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"},
            ["otlp"],
            "http://c:4317",
        ),
    ],
)
def test_variables_decide_whether_traces_are_on(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], exporters: list[str], url: str | None
) -> None:
    for name in tuple(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = TracingSettings.load()
    assert settings.exporters == exporters
    if exporters:
        assert settings.traces_url == url
    assert "http://" not in repr(settings)
