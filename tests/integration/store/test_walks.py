"""No script or command takes a server longer because more stands there."""

from __future__ import annotations

from pathlib import Path

from benchmarks.start_walks import SETTINGS, compare

from dynamo_redis.store.server import EmbeddedServer

FEW, MANY = 1_000, 30_000
BOUND = 10
"""A walk would take thirty times as long. Whatever else the machine does disturbs some calls, not most."""


async def test_nothing_takes_longer_where_more_stands(tmp_path: Path) -> None:
    for name in ("few", "many"):
        (tmp_path / name).mkdir()
    async with (
        EmbeddedServer(tmp_path / "few", settings=SETTINGS) as few,
        EmbeddedServer(tmp_path / "many", settings=SETTINGS) as many,
    ):
        ratios = await compare((few.url, many.url), (FEW, MANY))
    assert {name: ratio for name, ratio in ratios.items() if ratio > BOUND} == {}
