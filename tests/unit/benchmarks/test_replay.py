"""A replay counts as its columns say, and its simulation is the product's rule on its own caches."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.replay.__main__ import main, parse
from benchmarks.replay.figures import Figures, Outcome, figures
from benchmarks.replay.oracle import Difference, difference, read_blocks, write_blocks, wrong_share
from benchmarks.replay.plan import Chance, Mode, Plan
from benchmarks.replay.report import OMNISCIENT, load_entries, markdown, run_entry, save, simulated_entry
from benchmarks.replay.run import RunResult, worker_counts
from benchmarks.replay.simulation import KvAware, Omniscient, simulate
from benchmarks.replay.trace import (
    SHARED_TRACE,
    TRACE_BLOCK_SIZE,
    Trace,
    TracedRequest,
    find_trace,
    read_trace,
    shared_prompts_trace,
    synthetic_trace,
)


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "made_up.jsonl.gz"
    write_trace(synthetic_trace(150, seed=3), path)
    return path


def write_trace(trace: Trace, path: Path) -> None:
    lines = [
        json.dumps(
            {
                "timestamp": 1e3 * request.arrival_s,
                "input_length": request.prompt_count,
                "output_length": request.output_count,
                "hash_ids": request.block_ids,
            }
        )
        for request in trace.requests
    ]
    text = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def plan(path: Path, mode: Mode = "kv", replicas: int = 1) -> Plan:
    return Plan(
        trace=path,
        requests=150,
        arrivals="poisson",
        load=0.8,
        seed=5,
        workers=8,
        kv_blocks=128,
        mode=mode,
        replicas=replicas,
    )


# --------------------------------------------------------------------------- traces


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_trace_is_read_as_written(name: str, tmp_path: Path) -> None:
    trace = synthetic_trace(30)
    write_trace(trace, tmp_path / name)
    assert read_trace(tmp_path / name) == dataclasses.replace(trace, name="trace")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [0]}',
        '{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}',
        '{"timestamp": 0, "input_length": 5, "hash_ids": [0]}',
    ],
)
def test_trace_error_names_the_bad_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(synthetic_trace(1), path)
    path.write_text(f"{path.read_text()}\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_trace(path)


def test_made_up_trace_follows_from_its_seed() -> None:
    assert synthetic_trace(50, seed=1) == synthetic_trace(50, seed=1)
    assert synthetic_trace(50, seed=1) != synthetic_trace(50, seed=2)


def test_trace_is_given_else_shared_else_made_up(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    root.mkdir()
    assert find_trace(None, root, 5, seed=2) == synthetic_trace(5, seed=2)
    for path, count in ((root / SHARED_TRACE, 6), (tmp_path / "own.jsonl", 7)):
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        write_trace(synthetic_trace(count), path)
    assert len(find_trace(None, root, 5, seed=2).requests) == 6
    assert len(find_trace(tmp_path / "own.jsonl", root, 5, seed=2).requests) == 7


def test_made_up_block_always_follows_the_same_block() -> None:
    parents: dict[int, int] = {}
    repeated = 0
    for request in synthetic_trace(200).requests:
        for parent, block in zip((-1, *request.block_ids), request.block_ids, strict=False):
            repeated += block in parents
            assert parents.setdefault(block, parent) == parent
    assert repeated > len(parents)


def test_made_up_chats_share_long_prompts() -> None:
    trace = shared_prompts_trace(400, seed=1)
    assert trace == shared_prompts_trace(400, seed=1)
    firsts = Counter(request.block_ids[0] for request in trace.requests)
    assert len(firsts) <= 24
    assert max(firsts.values()) > 60
    repeated = sum(map(len, (one.block_ids for one in trace.requests)))
    assert len({block for one in trace.requests for block in one.block_ids}) < 0.25 * repeated


def test_equal_blocks_have_equal_tokens() -> None:
    tokens = TracedRequest(0.0, 2 * TRACE_BLOCK_SIZE + 3, 1, (7, 8, 9)).token_ids()
    assert len(tokens) == 2 * TRACE_BLOCK_SIZE + 3
    assert tokens[:TRACE_BLOCK_SIZE] == [7] * TRACE_BLOCK_SIZE
    assert tokens[-3:] == [9] * 3


def test_poisson_arrivals_keep_the_requests_and_have_their_rate() -> None:
    trace = synthetic_trace(2000)
    poisson = trace.as_poisson(4.0, random.Random(0))
    assert [one.block_ids for one in poisson.requests] == [one.block_ids for one in trace.requests]
    assert poisson.requests[-1].arrival_s == pytest.approx(500, rel=0.1)


# --------------------------------------------------------------------------- the simulation


def test_cache_routing_has_more_hits_and_answers_sooner(trace_file: Path) -> None:
    kv = figures(simulate(plan(trace_file)), 8)
    blind = figures(simulate(plan(trace_file, "rr")), 8)
    assert kv.requests == blind.requests == 150
    assert kv.hit_rate > 1.3 * blind.hit_rate
    assert kv.ttft_mean_s < 0.8 * blind.ttft_mean_s


def test_simulation_follows_from_its_seed(trace_file: Path) -> None:
    assert simulate(plan(trace_file), seed=1) == simulate(plan(trace_file), seed=1)


def test_product_decides_by_the_literal_cost(trace_file: Path) -> None:
    """Without delay in its index and its book, each choice is that of the omniscient router."""
    assert simulate(plan(trace_file), KvAware) == simulate(plan(trace_file), Omniscient)


def test_chance_depends_on_the_request_alone() -> None:
    """Earlier draws do not change it."""
    one, other = Chance(3), Chance(3)
    one.random()
    for chance in (one, other):
        chance.start_request(7)
    assert [one.random() for _ in range(3)] == [other.random() for _ in range(3)]
    other.start_request(8)
    assert one.random() != other.random()


def test_counting_shared_blocks_once_keeps_chats_where_they_are() -> None:
    shared = Plan(
        trace=None,
        requests=300,
        arrivals="poisson",
        load=2.0,
        seed=1,
        workers=8,
        kv_blocks=1024,
        workload="shared-prompts",
    )
    once, again = (figures(simulate(shared, counts_once=once), 8) for once in (True, False))
    assert once.hit_rate > again.hit_rate
    assert once.ttft_mean_s < again.ttft_mean_s


def test_predictions_find_less_than_events(trace_file: Path) -> None:
    known, predicted = (
        figures(simulate(plan(trace_file, mode, replicas=2)), 8) for mode in ("kv", "predicted")
    )
    assert predicted.hit_rate < known.hit_rate


def test_file_without_a_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("{}\n")
    with pytest.raises(SystemExit, match="line 1"):
        main(["--trace", str(path), "--simulate"])


def test_all_modes_can_be_simulated(trace_file: Path, tmp_path: Path) -> None:
    results = tmp_path / "replay.json"
    arguments = (
        f"--trace {trace_file} --simulate --requests 60 --workers 4 --replicas 1,2 --results {results}"
    )
    entries = main(arguments.split())
    assert [(entry.arrivals, entry.mode, entry.replicas) for entry in entries[2:]] == [
        (arrivals, mode, replicas)
        for arrivals in ("poisson", "given")
        for mode in ("kv", "predicted", "rr", "p2c")
        for replicas in (1, 2)
    ]
    assert all(entry.speedup == 1 for entry in entries)
    assert {(entry.arrivals, entry.requests) for entry in entries} == {("poisson", 60), ("given", 30)}
    assert not results.exists()


# --------------------------------------------------------------------------- figures, the oracle, the report


def outcome(
    index: int, worker: int, *, prompt: int, cached: int, matched: int = 0, ttft_s: float = 1.0
) -> Outcome:
    return Outcome(index, worker, prompt, cached, matched, ttft_s)


def test_figures_count_tokens() -> None:
    found = figures(
        [
            outcome(0, 1, prompt=100, cached=50, ttft_s=1.0),
            outcome(1, 1, prompt=100, cached=0, ttft_s=2.0),
            outcome(2, 2, prompt=100, cached=50, ttft_s=6.0),
        ],
        workers=2,
    )
    assert found == Figures(
        hit_rate=1 / 3,
        ttft_mean_s=3.0,
        ttft_p50_s=2.0,
        ttft_p99_s=6.0,
        imbalance=1.5,
        requests=3,
    )


def test_hit_that_the_worker_did_not_find_is_wrong() -> None:
    outcomes = [
        outcome(0, 1, prompt=100, cached=60, matched=40),
        outcome(1, 1, prompt=100, cached=10, matched=60),
    ]
    assert wrong_share(outcomes) == 0.5
    assert wrong_share([outcome(0, 1, prompt=100, cached=60)]) == 0


def test_index_difference_counts_missing_and_wrong_blocks(tmp_path: Path) -> None:
    for name, caches in {
        "truth": {1: {1, 2, 3}, 2: set[int]()},
        "index": {1: {2, 3}, 9: {2**64 - 1}},
    }.items():
        (tmp_path / name).mkdir()
        for instance_id, blocks in caches.items():
            write_blocks(tmp_path / name, instance_id, blocks)
    truth, index = read_blocks(tmp_path / "truth"), read_blocks(tmp_path / "index")
    assert difference(index, truth) == Difference(block_count=3, missing_count=1, wrong_count=1)
    assert not difference(index, truth).equal
    assert difference(truth, truth).equal


def result(*differences: Difference) -> RunResult:
    return RunResult(
        outcomes=[outcome(0, 1, prompt=100, cached=60, matched=50)],
        failed={"connection_lost": 2},
        lost_count=1,
        length_s=2.0,
        events_count=100,
        cpu_s=3.0,
        late_s=0.01,
        differences=differences,
        quiet_s=0.1,
    )


def test_rows_that_did_not_run_keep_their_figures(trace_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "replay.json"
    one = plan(trace_file)
    former = [
        run_entry(one, "t", None, [result(Difference(5, 0, 0))]),
        run_entry(one, "t", "redis", [result(Difference(5, 2, 1))]),
    ]
    reference = simulated_entry(one, "t", [figures(result().outcomes, 4)], mode=OMNISCIENT)
    save(former, path)
    save([reference, run_entry(dataclasses.replace(one, mode="rr"), "t", None, [result()])], path)
    kept = load_entries(path)
    assert [(row.mode, row.fault) for row in kept] == [
        ("omniscient", None),
        ("kv", None),
        ("rr", None),
        ("kv", "redis"),
    ]
    assert {former[0], former[1], reference} <= set(kept)
    assert [row.index for row in kept] == [None, "equal", None, "2 missing, 1 wrong of 5"]


def test_row_is_the_mean_of_its_runs(trace_file: Path) -> None:
    runs = [
        dataclasses.replace(result(), outcomes=[outcome(0, 1, prompt=100, cached=cached)])
        for cached in (40, 60)
    ]
    row = run_entry(plan(trace_file), "t", None, runs)
    assert (row.repeats, row.hit_rate, row.hit_rate_spread) == (2, 0.5, 0.14142)
    assert (row.failed_count, row.lost_count) == (4, 2)
    assert "| 0.500 ± 0.141 |" in markdown([row])


def test_table_compares_rows_with_the_omniscient_router(trace_file: Path) -> None:
    one = plan(trace_file)
    reference = simulated_entry(
        one, "t", [figures([outcome(0, 1, prompt=100, cached=80, ttft_s=0.5)], 4)], mode=OMNISCIENT
    )
    table = markdown([reference, run_entry(one, "t", None, [result(Difference(5, 0, 0))])]).splitlines()
    assert table[-1].startswith("| Poisson 0.8, kv × 1 | 0.600 | 0.75 | 1.00 | 2.00 |")
    assert "| equal |" in table[-1]


@pytest.mark.parametrize(
    ("workers", "alone", "counts"),
    [(16, False, [4] * 4), (6, False, [4, 2]), (6, True, [1, 4, 1]), (1, True, [1])],
)
def test_workers_share_processes(workers: int, alone: bool, counts: list[int]) -> None:
    assert worker_counts(workers, alone=alone) == counts


def test_command_line_chooses_the_runs() -> None:
    options = parse(["--modes", "kv,rr", "--replicas", "1,4", "--arrivals", "given", "--faults", "redis"])
    runs = [(plan.arrivals, plan.mode, plan.replicas, plan.speedup, fault) for plan, fault in options.runs]
    assert runs == [
        ("given", "kv", 1, 8.0, None),
        ("given", "kv", 4, 8.0, None),
        ("given", "rr", 1, 8.0, None),
        ("given", "rr", 4, 8.0, None),
        ("given", "kv", 4, 8.0, "redis"),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--modes", "kv,x"],
        ["--replicas", "0"],
        ["--trace", "nowhere.jsonl"],
        ["--speedup", "0"],
        ["--faults", "all"],
        ["--workload", "shared-prompts"],
        ["--workload", "shared-prompts", "--arrivals", "poisson", "--trace", "pyproject.toml"],
    ],
)
def test_impossible_runs_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
