from __future__ import annotations

import json

import pytest

from dynamo_redis.cli.formats import (
    human_duration,
    human_size,
    human_time,
    printable,
    redact,
    show_value,
)

INSTANCE_KEY = "v1/instances/dynamo/backend/generate/694d98147d54bfde"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://host:6379", "redis://host:6379"),
        ("redis://:pw@host:6379", "redis://:***@host:6379"),
        ("rediss://user:pw@host", "rediss://user:***@host"),
        ("redis://user:p@w:x/y@host/0", "redis://user:***@host/0"),
        ("unix:///run/redis.sock?password=pw&db=0", "unix:///run/redis.sock?password=***&db=0"),
        ("rediss://host?ssl_password=pw", "rediss://host?ssl_password=***"),
        (
            "redis+sentinel://user:pw@a:1,b:2/m?sentinel_username=u&sentinel_password=pw&x=1",
            "redis+sentinel://user:***@a:1,b:2/m?sentinel_username=u&sentinel_password=***&x=1",
        ),
        ("no connection to REDIS://u:pw@h:1, give up", "no connection to REDIS://u:***@h:1, give up"),
        ("curl http://localhost:8000/v1/models", "curl http://localhost:8000/v1/models"),
        ("two redis://a:b@c and redis://d:e@f", "two redis://a:***@c and redis://d:***@f"),
    ],
)
def test_passwords_in_urls_are_masked(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (726, "726 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (9728, "9.5 KiB"),
        (10_240, "10 KiB"),
        (1024 * 1024 - 1, "1.0 MiB"),
        (11_422_654, "11 MiB"),
        (1 << 30, "1.0 GiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, shown: str) -> None:
    assert human_size(size_bytes) == shown


@pytest.mark.parametrize(
    ("duration_s", "shown"),
    [(-5, "0s"), (0.9, "0s"), (59.9, "59s"), (200, "3m 20s"), (7500, "2h 5m"), (356_400, "4d 3h")],
)
def test_durations_for_people(duration_s: float, shown: str) -> None:
    assert human_duration(duration_s) == shown


def test_times_for_people_tell_the_age() -> None:
    assert human_time(1_760_000_000.0, 1_760_000_200.0).endswith("(3m 20s ago)")


@pytest.mark.parametrize(
    ("stored", "encoding", "value"),
    [
        (b'{"a": [1, 2]}', "json", {"a": [1, 2]}),
        (b"7587888160958627806", "json", 7587888160958627806),
        (b"hello", "text", "hello"),
        (b"", "text", ""),
        (b"\xff\x00", "base64", "/wA="),
        (b"[" * 100_000, "text", "[" * 100_000),
    ],
)
def test_stored_values_are_decoded_as_far_as_they_can_be(stored: bytes, encoding: str, value: object) -> None:
    shown = show_value("app/key", stored)
    assert (shown.encoding, shown.value) == (encoding, value)


def test_binary_values_are_marked_for_people() -> None:
    assert show_value("k", b"\xff").pretty() == "base64:/w=="


def test_the_secret_of_an_instance_is_hidden_unless_asked_for() -> None:
    stored = json.dumps({"instance_id": 1, "secret": "c0ffee"}).encode()
    hidden = show_value(INSTANCE_KEY, stored)
    assert "c0ffee" not in hidden.pretty() + hidden.compact() + json.dumps(hidden.value)
    assert show_value(INSTANCE_KEY, stored, secrets=True).value["secret"] == "c0ffee"
    assert show_value("app/key", stored).value["secret"] == "c0ffee", "other keys are the user's own"


def test_stored_text_cannot_control_the_terminal() -> None:
    assert printable("a\x1b[2Jb\tc\r\n") == "a\\x1b[2Jb\tc\\x0d\n"
