"""The access line: text of clients and workers stays within its word."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from dynamo_redis.frontend.observation import Observation, access_log, observed
from dynamo_redis.runtime.logging import JsonFormatter, TextFormatter

HOSTILE = [
    "qwen status=500",
    'qwen" status=500 "',
    "qwen\n2026-01-01T00:00:00.000Z INFO    dynamo_redis.access: GET / 200",
    "\x1b[2K\rqwen",
    "\u202eqwen",
]


def scope_of(path: bytes) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": path.decode("latin-1"), "raw_path": path, "headers": []}


def lines_of(observation: Observation, caplog: pytest.LogCaptureFixture) -> tuple[str, dict[str, Any]]:
    """End a request; return its line as text and as JSON."""
    with caplog.at_level(logging.INFO, logger=access_log.name):
        observation.end(logs=True)
    [record] = caplog.records
    return TextFormatter("").format(record), json.loads(JsonFormatter("").format(record))


@pytest.mark.parametrize("name", HOSTILE)
def test_model_name_stays_within_its_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    observation = Observation(scope_of(b"/v1/completions"))
    observation.status, observation.model = 200, name
    text, found = lines_of(observation, caplog)
    assert text.isprintable()
    assert f" model={json.dumps(name)} " in text
    assert found["model"] == name


@pytest.mark.parametrize("path", [b"/a b status=1", b"/a\r\nb", b"/\xff\xfe", b"/" + b"a" * 100_000])
def test_path_stays_within_its_word(path: bytes, caplog: pytest.LogCaptureFixture) -> None:
    observation = Observation(scope_of(path))
    observation.status = 404
    text, found = lines_of(observation, caplog)
    assert text.isprintable()
    assert len(text) < 400
    words = (found["path"], json.dumps(found["path"]))  # quoted, unless it is plain
    assert any(f"access: POST {word} 404 " in text for word in words)
    assert found["status"] == 404


def test_line_without_a_response_has_the_status_499(caplog: pytest.LogCaptureFixture) -> None:
    _, found = lines_of(Observation(scope_of(b"/v1/completions")), caplog)
    assert found["status"] == 499


def test_application_is_not_wrapped_without_need() -> None:
    async def app(*_: Any) -> None: ...

    assert observed(app, logs=False) is app
    assert observed(app, logs=True) is not app
