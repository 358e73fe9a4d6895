"""Suite `request` measures what its rows say, of sides that answer in full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmarks.request import matrix as request_matrix
from benchmarks.request.__main__ import ALONE, BOUNDS, COMPARISONS, selection
from benchmarks.request.matrix import NATS, OURS, RAW, STAGES, Cell
from benchmarks.request.rivals import plane, raw
from benchmarks.request.rivals.peer import Peer, WrongAnswer, burst, tick
from benchmarks.request.rivals.peers import measure
from benchmarks.request.rounds import cell
from benchmarks.request.sides import SIDES, Figures
from benchmarks.request.workloads import ITEMS, WORKLOADS, Kind, Workload

# --------------------------------------------------------------------------- rows and cells


def test_every_row_has_a_measurement() -> None:
    assert COMPARISONS.keys() | ALONE.keys() == BOUNDS.keys()
    assert COMPARISONS.keys().isdisjoint(ALONE)
    matrix = {(workload, side) for stage in STAGES for side, names in stage.items() for workload in names}
    for comparison in COMPARISONS.values():
        assert comparison.cells <= matrix
        assert any({comparison.ours, comparison.rival} <= stage.keys() for stage in STAGES)
    assert {side for stage in STAGES for side in stage} == SIDES.keys()


def test_everything_is_measured_by_default() -> None:
    cells, rows = selection(None, None, None)
    assert rows == BOUNDS.keys()
    assert len(cells) == sum(len(names) for stage in STAGES for names in stage.values())


def test_rows_take_only_the_cells_they_need() -> None:
    cells, rows = selection({"P5", "P14"}, None, None)
    assert cells == {("unary c=1", OURS), ("unary c=1", RAW)}
    assert rows == {"P5", "P14"}


def test_part_of_the_matrix_gives_its_rows() -> None:
    cells, rows = selection(None, {"unary c=64"}, {OURS, NATS})
    assert cells == {("unary c=64", OURS), ("unary c=64", NATS)}
    assert rows == {"P1", "P6", "P7"}


def test_row_that_lacks_a_side_is_left_out() -> None:
    assert selection({"P1", "P8"}, None, {OURS}) == ({("unary c=64", OURS), ("tick", OURS)}, set())


def figures(per_s: float, p99_ms: float, cpu_s_per_100k: float) -> Figures:
    return Figures(per_s, 1.0, p99_ms, cpu_s_per_100k)


def test_row_above_its_must_is_one_where_ours_is_better() -> None:
    rounds = {OURS: [figures(200, 2, 1)], NATS: [figures(100, 8, 5)]}
    ratios = {name: COMPARISONS[name].measured(rounds).ratio for name in ("P1", "P6", "P7")}
    assert ratios == {"P1": 2, "P6": 5, "P7": 4}


def test_cell_holds_the_medians() -> None:
    rounds = [figures(1, 30, 7), figures(3, 10, 9), figures(2, 20, 8)]
    assert cell("tick", OURS, rounds) == Cell("tick", OURS, "items", 2, 1, 20, 8, 3)


def test_cells_that_were_not_measured_keep_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_matrix, "PATH", tmp_path / "results" / "all.json")

    def one(workload: str, per_s: float) -> Cell:
        return Cell(workload, OURS, "requests", per_s, 1, 2, 3, 5)

    request_matrix.save([one("tick", 1), one("unary c=1", 2)])
    request_matrix.save([one("tick", 9)])
    assert request_matrix.load() == [one("unary c=1", 2), one("tick", 9)]


# --------------------------------------------------------------------------- the load


class Fake(Peer):
    """Answers at once, and cuts off the chosen answers."""

    def __init__(self, missing: int = 0) -> None:
        self._missing = missing

    async def echo(self, payload: bytes) -> Any:
        await asyncio.sleep(0)
        return payload[self._missing :]

    async def stream(self, kind: Kind, count: int) -> int:
        await asyncio.sleep(0)
        return count - self._missing


@pytest.mark.parametrize("name", ["unary c=64", "burst"])
async def test_side_with_short_answers_is_not_measured(name: str) -> None:
    with pytest.raises(WrongAnswer):
        await Fake(missing=1).drive(WORKLOADS[name], 0.01)


async def test_every_answer_is_counted_once() -> None:
    class Counting(Fake):
        asked = 0

        async def echo(self, payload: bytes) -> Any:
            self.asked += 1
            return await super().echo(payload)

    peer = Counting()
    found = await measure(peer, "unary c=64", 0.02)
    assert found["count"] == peer.asked >= 64
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= 1e3 * found["seconds"]


async def test_generators_yield_the_requested_number_of_items() -> None:
    async def count(items: AsyncIterator[Any]) -> int:
        return len([item async for item in items])

    assert (await count(burst(ITEMS)), await count(tick(ITEMS))) == (ITEMS, ITEMS)


@pytest.mark.parametrize(
    ("module", "how", "kinds"),
    [
        (plane, (), ("echo", "burst", "tick")),
        (raw, (), ("echo",)),
        (raw, ("callback",), ("echo",)),
    ],
)
async def test_sides_without_third_parties_answer(
    module: ModuleType, how: tuple[str, ...], kinds: tuple[Kind, ...]
) -> None:
    announced: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(module.serve(announced.set_result))
    try:
        peer = await module.connect(await announced, *how)
        for kind in kinds:
            assert await peer.drive(Workload("short", kind, 4), 0.02)
        await peer.aclose()
    finally:
        serving.cancel()
        await asyncio.wait([serving])
