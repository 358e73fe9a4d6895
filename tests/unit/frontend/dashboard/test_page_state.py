"""The state of the page: processes joined, the verdict, and what changes."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_redis.frontend.dashboard.event_log import Event
from dynamo_redis.frontend.dashboard.page_state import Assembler, CardFacts, InstanceView, State, difference
from dynamo_redis.frontend.dashboard.problems import ModelView
from dynamo_redis.frontend.dashboard.reading import ProcessReading, RouterReading, WorkerBlocks
from dynamo_redis.frontend.dashboard.seconds import TIMES, Second

NOW = 1000.0
NAMES = ("a.b.c/1", "a.b.c/2")
VIEWS = {name: InstanceView("a.b.c", name[-1], "demo", "10.0.0.1:1", 900.0) for name in NAMES}
CARDS = {name: CardFacts(("demo",), 200 if name == NAMES[0] else None) for name in NAMES}
MODEL = ModelView("demo", True, 4096, 2, 0, 0, 0, 1, None)


def process(pid: int = 1, **fields: Any) -> ProcessReading:
    return ProcessReading(pid=pid, redis_connected=True).model_copy(update=fields)


def state_of(
    *processes: ProcessReading,
    models: tuple[ModelView, ...] = (MODEL,),
    blocks: dict[str, WorkerBlocks] | None = None,
    cards: dict[str, CardFacts] = CARDS,
    silent: tuple[str, ...] = (),
) -> State:
    return Assembler().state(NOW, processes or (process(),), models, VIEWS, blocks or {}, cards, silent)


def counted(at: int, requests: int) -> Second:
    limits = TIMES["first"]
    place = limits.index(0.1)
    counts = [0] * place + [requests] * (len(limits) + 1 - place)
    return Second(at, requests, 30.0 * requests, {}, {"first": counts})


def test_counts_of_all_processes_are_added() -> None:
    seconds = [counted(at, 1) for at in range(980, 1000)]
    alike = [Event(1, 900.0, "joined", "a.b.c", 1, "1"), Event(2, 901.0, "migrated", "", 1, "")]
    state = state_of(
        process(1, seconds=seconds, members={"a.b.c/1": ("serving", 3)}, events=alike, waiting_count=1),
        process(2, seconds=seconds, members={"a.b.c/1": ("silent", 4)}, events=alike),
    )
    figures = state["figures"]
    assert (figures["requests_s"], figures["tokens_s"], figures["ended"]) == (2.0, 60.0, 40)
    assert 50 < figures["times"]["first"][0] < 100
    assert figures["times"]["gap"] == [None, None, None]
    assert state["loads"]["a.b.c/1"] == ["silent", 7, None, 200, None]
    assert state["loads"]["a.b.c/2"] == ["serving", 0, None, None, None]
    assert figures["states"] == {"silent": 1, "serving": 1}
    assert list(state["events"]) == ["1.1", "1.2", "2.2"]
    assert state["points"]["985"][:2] == [2, 60.0]
    assert figures["waiting"] == 1


def test_loads_of_routers_are_shown() -> None:
    blocks = {"a.b.c/1": WorkerBlocks(requests=5, used=50, cached=80)}
    router = RouterReading(
        router_id="r", endpoint="a.b.c", mode="events", connected=True, prompt_tokens=100, cached_tokens=25
    )
    state = state_of(process(routers=[router]), blocks=blocks)
    assert state["loads"]["a.b.c/1"] == ["serving", 5, 50, 200, 80]
    assert state["figures"]["hit_rate"] == 0.25
    assert state["problems"] == []


def test_late_counts_of_a_process_are_taken() -> None:
    assembler = Assembler()

    def taken(now: float, *processes: ProcessReading) -> State:
        return assembler.state(now, processes, (MODEL,), VIEWS, {}, CARDS)

    taken(NOW, process(1, seconds=[counted(1000, 1)]))
    later = taken(NOW + 1, process(1, seconds=[counted(1000, 1)]), process(2, seconds=[counted(1000, 4)]))
    assert later["points"]["1000"][0] == 5
    assert taken(NOW + 400, process(1))["points"] == {}


@pytest.mark.parametrize(
    ("changed", "level", "title", "words"),
    [
        ({}, "ok", "Serving", None),
        ({"models": ()}, "bad", "Not serving", "No model is registered"),
        ({"cards": {}}, "bad", "Not serving", "No instance of model demo"),
        (
            {"models": (MODEL, MODEL._replace(name="new", is_served=False, failure="no tokenizer"))},
            "bad", "Serving, with failures", "Model new cannot be loaded",
        ),
        ({"redis_connected": False}, "warn", "Serving, with warnings", "Redis does not answer"),
        ({"redis_refusal": "OOM"}, "warn", "Serving, with warnings", "Redis refuses writes"),
        ({"members": {"a.b.c/1": ("failing", 0)}}, "warn", "Serving, with warnings", "1 instance is failing"),
        (
            {"members": dict.fromkeys(NAMES, ("down", 0))},
            "bad", "Not serving", "No instance of model demo",
        ),
        ({"members": dict.fromkeys(NAMES, ("busy", 9))}, "warn", "Serving, with warnings", "All instances"),
        ({"waiting_count": 2}, "warn", "Serving, with warnings", "2 requests wait for a place"),
        (
            {"seconds": [Second(990, 10, failures={"overload": 2})]},
            "warn", "Serving, with warnings", "2 of 10 requests failed",
        ),
        (
            {"seconds": [Second(990, 10, failures={"overload": 9})]},
            "bad", "Serving, with failures", "9 of 10 requests failed",
        ),
        (
            {"routers": [RouterReading(router_id="r", endpoint="a.b.c", mode="events", connected=False)]},
            "warn", "Serving, with warnings", "cannot read KV events",
        ),
        (
            {
                "routers": [
                    RouterReading(router_id="r", endpoint="a.b.c", mode="events", lag_entries=7, lag_s=9.0)
                ]
            },
            "warn", "Serving, with warnings", "is 9 s behind",
        ),
        ({"silent": ("77",)}, "warn", "Serving, with warnings", "1 frontend process does not answer: 77"),
    ],
)  # fmt: skip
def test_verdict_names_what_is_wrong(
    changed: dict[str, Any], level: str, title: str, words: str | None
) -> None:
    given = {name: changed[name] for name in ("models", "cards", "silent") if name in changed}
    fields = {name: value for name, value in changed.items() if name not in given}
    state = state_of(process(**fields), **given)
    assert state["verdict"][:2] == (level, title)
    if words is None:
        assert state["problems"] == []
    else:
        assert words in state["problems"][0].text


def test_difference_leads_from_one_state_to_the_next() -> None:
    before = state_of(process(members={"a.b.c/1": ("serving", 1)}))
    after = {
        **state_of(
            process(members={"a.b.c/1": ("serving", 2)}, events=[Event(1, 1.0, "migrated", "", 1, "")])
        ),
        "who": {"a.b.c/1": VIEWS["a.b.c/1"]},
    }
    change = difference(before, after)
    assert change["loads"] == {"set": {"a.b.c/1": ["serving", 2, None, 200, None]}, "gone": []}
    assert change["who"] == {"set": {}, "gone": ["a.b.c/2"]}
    assert list(change["events"]["set"]) == ["1.1"]
    assert not change.keys() & {"models", "routers", "processes", "points"}
