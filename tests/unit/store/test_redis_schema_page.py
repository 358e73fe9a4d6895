"""`docs/redis-schema.md` against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.event_base import GROUP_TTL_S, StreamName
from dynamo_redis.store.keys import SCHEMA_VERSION, STRUCTURES, RegistryKeys, StreamKeys
from dynamo_redis.store.redis.key_types import TYPES
from dynamo_redis.store.scripts import load_script


@pytest.fixture
def page(repository: Path) -> str:
    return (repository / "docs" / "redis-schema.md").read_text("utf-8")


def section(page: str, title: str) -> str:
    return re.split(rf"^## {title}$", page, flags=re.MULTILINE)[1].split("\n## ")[0]


def fields_of(page: str, key: str, of_what: str = "") -> list[str]:
    table = (
        page.split(f"**`{key}`{' ' * bool(of_what)}{of_what}")[1]
        .split("| field | holds |")[1]
        .split("\n\n")[0]
    )
    return re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)


def prelude() -> str:
    return load_script("registry_prelude", "registry_clock").source


def test_every_key_is_of_the_type_described(page: str) -> None:
    rows = re.findall(r"^\| (?:\*tag\*)?`[^`]*:([a-z]+)` \| (\w+) \|", page, flags=re.MULTILINE)
    assert dict(rows) == TYPES


def test_every_registry_key_is_described_and_no_other(page: str) -> None:
    described = re.findall(r"^\| `(\{prefix\}[^`]*)` \|", section(page, "Registry"), flags=re.MULTILINE)
    keys = RegistryKeys("prefix")
    assert described == [*keys.structures, keys.lease(LeaseId(255)).replace("ff", "<lease>")]


def test_the_fields_of_meta_are_those_the_scripts_use(page: str) -> None:
    used = re.search(r"'HMGET', META, (.*?)\)", prelude())
    assert used is not None
    assert fields_of(page, "{prefix}:meta") == re.findall(r"'(\w+)'", used[1])


def test_the_fields_of_the_log_are_those_the_scripts_write(page: str) -> None:
    written = re.search(r"'XADD', LOG.*?'\*',(.*?)\)", prelude(), flags=re.DOTALL)
    assert written is not None
    assert fields_of(page, "{prefix}:log") == re.findall(r"'(\w+)'", written[1])


def test_the_numbers_are_the_code_s(page: str) -> None:
    for name, number in (("LOG_FLOOR", "10,000"), ("REAP_LEASES", "64"), ("LATE_MS", "900")):
        value = re.search(rf"local {name} = (\d+)", prelude())
        assert value is not None
        assert int(value[1]) == int(number.replace(",", ""))
    assert "max(10,000, 4 × live keys)" in page
    assert "up to 64 ended leases a call" in page
    assert "more than 900 ms count for nothing" in page
    search = re.search(r"local SEARCH = (\d+)", load_script("registry_write").source)
    assert search is not None
    assert f"newest {int(search[1]):,} entries" in page
    assert f"now `{SCHEMA_VERSION}`" in page
    assert f"local MAJOR = '{SCHEMA_VERSION.partition('.')[0]}'" in prelude()


def test_scripts_get_the_structures_in_the_order_they_name_them() -> None:
    names = re.search(r"^local (META.*?) = KEYS\[1\]", prelude(), flags=re.MULTILINE)
    assert names is not None
    assert [name.lower() for name in names[1].split(", ")] == list(STRUCTURES)


def test_every_key_of_an_event_stream_is_described_and_no_other(page: str) -> None:
    keys = StreamKeys("dynamo", StreamName("dynamo", "backend", "kv_events"))
    assert keys.tag in page
    described = re.findall(r"^\| \*tag\*`(:\w+)` \|", section(page, "Event streams"), flags=re.MULTILINE)
    assert sorted(keys.tag + name for name in described) == sorted(keys.all)


def test_the_fields_of_a_stream_s_head_are_those_the_scripts_use(page: str) -> None:
    script = load_script("stream_prelude").source
    used = re.search(r"'HMGET', META, (.*?)\)", script)
    assert used is not None
    assert fields_of(page, ":meta", "of a stream") == re.findall(r"'(\w+)'", used[1])
    assert "local MAX_STEP_MS = 10000" in script
    assert "never by more than 10 s" in section(page, "Event streams")
    assert f"silent for {3 * GROUP_TTL_S:g} s" in section(page, "Event streams")
