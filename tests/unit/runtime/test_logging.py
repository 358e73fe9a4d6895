"""Log lines: one event a line, with its request, whatever text peers have chosen."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from dynamo_redis.config import RuntimeSettings
from dynamo_redis.planes.context import Context, current_request
from dynamo_redis.runtime.logging import JsonFormatter, TextFormatter, configure_dynamo_logging

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
HOSTILE = [
    "a\n2026-01-01T00:00:00.000Z ERROR   forged: line",
    "a\r\nb",
    "\x1b[2J\x1b]0;title\x07",
    "\x85next\x9bline",
    "file\u202egnp.exe",
    "\u2066isolate\u2069 \u200emark\u061c",
    "separator\u2028and\u2029paragraph",
    "half \ud83d of a character",
    "null \x00 byte",
]


def record(message: str = "hello %s", *args: object, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("dynamo_redis.part", logging.WARNING, __file__, 1, message, args, None)
    made.__dict__.update(fields)
    return made


@contextmanager
def serving(context: Context) -> Iterator[None]:
    token = current_request.set(context)
    try:
        yield
    finally:
        current_request.reset(token)


@contextmanager
def log_restored() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("dynamo_redis")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


def failure(text: str) -> Any:
    try:
        raise ValueError(text)
    except ValueError:
        return sys.exc_info()


# --------------------------------------------------------------------------- text


def test_text_line_has_time_level_process_logger() -> None:
    line = TextFormatter("worker-1f").format(record("hello %s", "world", created=0.25, msecs=250))
    assert line == "1970-01-01T00:00:00.250Z WARNING worker-1f dynamo_redis.part: hello world"


def test_text_line_names_its_request() -> None:
    with serving(Context("abc")):
        assert TextFormatter("").format(record("hi")).endswith(": hi [request abc]")
        assert TextFormatter("").format(record("request abc failed")).endswith(": request abc failed")
    assert TextFormatter("").format(record("hi")).endswith(": hi")


@pytest.mark.parametrize("text", HOSTILE)
def test_text_line_cannot_be_forged(text: str) -> None:
    line = TextFormatter("").format(record("model %s is gone", text))
    assert line.isprintable()
    assert ascii(text)[1:-1].split("\\")[0] in line


@pytest.mark.parametrize("text", HOSTILE)
def test_request_id_cannot_forge_a_line(text: str) -> None:
    with serving(Context(text)):
        assert TextFormatter("").format(record("hi")).isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_traceback_cannot_forge_a_line(text: str) -> None:
    first, *rest = TextFormatter("").format(record("it failed", exc_info=failure(text))).split("\n")
    assert first.endswith("it failed")
    assert rest[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") and line.isprintable() for line in rest)


def test_escaped_text_is_readable() -> None:
    line = TextFormatter("").format(record("%s", "a\nb\tc \x1b \u202e é 漢"))
    assert line.endswith(r"a\nb\tc \x1b \u202e é 漢")


# --------------------------------------------------------------------------- json


def test_json_line_has_dynamo_names() -> None:
    made = record("hello %s", "world", created=datetime(2026, 1, 2, 3, 4, 5, 678, UTC).timestamp())
    assert json.loads(JsonFormatter("worker-1f").format(made)) == {
        "time": "2026-01-02T03:04:05.000678Z",
        "level": "WARNING",
        "target": "dynamo_redis.part",
        "message": "hello world",
        "process": "worker-1f",
    }


def test_json_line_names_request_and_trace() -> None:
    with serving(Context("abc", traceparent=f"00-{TRACE}-{SPAN}-01")):
        line = json.loads(JsonFormatter("").format(record("hi")))
    assert (line["request_id"], line["trace_id"], line["span_id"]) == ("abc", TRACE, SPAN)
    with serving(Context("abc", traceparent="nonsense")):
        assert "trace_id" not in json.loads(JsonFormatter("").format(record("hi")))


@pytest.mark.parametrize("text", HOSTILE)
def test_json_line_cannot_be_forged(text: str) -> None:
    with serving(Context(text)):
        made = record("model %s", text, exc_info=failure(text), fields={"model": text})
        line = JsonFormatter(text).format(made)
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line)
    assert found["message"] == f"model {text}"
    assert found["request_id"] == found["model"] == text
    assert found["exception"].endswith(f"ValueError: {text}")


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("environment", "is_json"),
    [
        ({}, False),
        ({"DYN_LOG_FORMAT": "text"}, False),
        ({"DYN_LOG_FORMAT": "json"}, True),
        ({"DYN_LOGGING_JSONL": "1"}, True),
        ({"DYN_LOGGING_JSONL": "true", "DYN_LOG_FORMAT": "text"}, True),
    ],
)
def test_format_is_chosen_by_settings(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    is_json: bool,
) -> None:
    for name in ("DYN_LOG_FORMAT", "DYN_LOGGING_JSONL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with log_restored():
        configure_dynamo_logging("frontend", settings=RuntimeSettings.load(log="info"))
        logging.getLogger("dynamo_redis.part").info("shown")
        logging.getLogger("dynamo_redis.part").debug("not shown")
        logging.getLogger("other").info("not shown")
    shown = capsys.readouterr().err
    if is_json:
        assert json.loads(shown)["message"] == "shown"
    else:
        assert re.fullmatch(r"\S+Z INFO    frontend dynamo_redis\.part: shown\n", shown)
