"""`docs/settings.md` agrees with the code."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from dynamo_redis import errors
from dynamo_redis.cli.options import shown_default
from dynamo_redis.cli.settings_page import render
from dynamo_redis.config import GROUPS, MockEngineSettings, env_name, unit_of

BEGIN = "<!-- Written by `dynamo-redis settings --markdown`. -->\n"
END = "<!-- End of what is written. -->\n"

FIELDS = {env_name(field): field for group in GROUPS for field in group.model_fields.values()}
NO_TIMEOUTS = {env_name(field) for field in MockEngineSettings.model_fields.values()}


@pytest.fixture
def page(repository: Path) -> str:
    return (repository / "docs" / "settings.md").read_text()


@pytest.fixture
def timeouts(page: str) -> list[list[str]]:
    """Return the rows of the table of time-outs: what waits, set by, default, then."""
    table = page.partition("## Every time-out")[2]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_every_setting_is_on_the_page_as_it_is_in_the_code(page: str) -> None:
    written = page.partition(BEGIN)[2].partition(END)[0].strip()
    assert written == render().strip(), "put what `dynamo-redis settings --markdown` prints between the marks"


def test_every_duration_is_in_the_table_of_timeouts(timeouts: list[list[str]]) -> None:
    named = {name for row in timeouts for name in re.findall(r"`(DYN_\w+)`", row[1])}
    durations = {env for env, field in FIELDS.items() if unit_of(field) == "s"} - NO_TIMEOUTS
    assert durations - named == set()


def test_every_default_in_the_table_is_the_codes(timeouts: list[list[str]]) -> None:
    assert len(timeouts) > 20
    for waits, source, default, _ in timeouts:
        setting, constant = re.match(r"`(DYN_\w+)`", source), re.search(r"`([a-z_.]+)\.([A-Z_]+)`", source)
        if constant is not None:
            value = getattr(import_module(f"dynamo_redis.{constant[1]}"), constant[2])
            assert default == f"`{value:g} s`", waits
        else:
            assert setting is not None, waits
            assert default == f"`{shown_default(FIELDS[setting[1]])}`", waits


def test_every_error_in_the_table_exists(timeouts: list[list[str]]) -> None:
    named = {name for row in timeouts for name in re.findall(r"`([A-Z][a-z]+[A-Z]\w+)`", row[3])}
    assert len(named) >= 8
    for name in named:
        assert issubclass(getattr(errors, name), errors.DynamoRedisError)
