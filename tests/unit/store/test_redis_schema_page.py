"""`docs/redis-schema.md` against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.keys import SCHEMA_VERSION, STRUCTURES, RegistryKeys
from dynamo_redis.store.scripts import load_script


@pytest.fixture
def page(repository: Path) -> str:
    return (repository / "docs" / "redis-schema.md").read_text("utf-8")


def section(page: str, title: str) -> str:
    return re.split(rf"^## {title}$", page, flags=re.MULTILINE)[1].split("\n## ")[0]


def fields_of(page: str, key: str) -> list[str]:
    table = page.split(f"**`{key}`")[1].split("| field | holds |")[1].split("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)


def prelude() -> str:
    return load_script("registry_prelude", "registry_clock").source


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
    for name, number in (("LOG_FLOOR", "10,000"), ("REAP_LEASES", "64"), ("MAX_STEP_MS", "1,000")):
        value = re.search(rf"local {name} = (\d+)", prelude())
        assert value is not None
        assert int(value[1]) == int(number.replace(",", ""))
    assert "max(10,000, 4 × live keys)" in page
    assert "up to 64 ended leases a call" in page
    assert "never by more than 1 s" in page
    search = re.search(r"local SEARCH = (\d+)", load_script("registry_write").source)
    assert search is not None
    assert f"newest {int(search[1]):,} entries" in page
    assert f"now `{SCHEMA_VERSION}`" in page
    assert f"local MAJOR = '{SCHEMA_VERSION.partition('.')[0]}'" in prelude()


def test_scripts_get_the_structures_in_the_order_they_name_them() -> None:
    names = re.search(r"^local (META.*?) = KEYS\[1\]", prelude(), flags=re.MULTILINE)
    assert names is not None
    assert [name.lower() for name in names[1].split(", ")] == list(STRUCTURES)
