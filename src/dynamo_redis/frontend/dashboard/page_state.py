"""The state of the page: the readings of all frontend processes, joined; and what changes from one to the
next. Pure.

Strings of Redis (names, addresses, reasons) are passed on as they are: the page shows them as text only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from dynamo_redis.frontend.dashboard.event_log import OWN_KINDS
from dynamo_redis.frontend.dashboard.problems import ModelView, find_problems, verdict
from dynamo_redis.frontend.dashboard.reading import STATES, InstanceState, ProcessReading, WorkerBlocks
from dynamo_redis.frontend.dashboard.seconds import HISTORY_S, TIMES, Second, percentile, summed

RATE_S: Final = 10
"""Seconds over which rates are taken."""

LATENCY_S: Final = 60
"""Seconds over which percentiles are taken, and failures counted."""

_LATE_S: Final = 3
"""Seconds for which a process may be late with its counts."""

_PARTS: Final = (0.5, 0.9, 0.99)
_TABLES: Final = ("who", "loads", "points", "events")
_LISTS: Final = ("models", "routers", "processes")

_UNREACHABLE: Final = frozenset({"down", "not ready", "draining", "registered"})

State = dict[str, Any]


class InstanceView(NamedTuple):
    """The constant part of an instance. `models` are the names of those that it serves, in one text."""

    endpoint: str
    instance_id: str
    models: str
    address: str
    started_at: float


class CardFacts(NamedTuple):
    """The facts of an instance in the cards: the models that it serves, and the blocks of its KV cache."""

    models: tuple[str, ...]
    total_blocks: int | None


class Assembler:
    """Joins the readings of one moment to the state of the page, with the counts of the last minutes."""

    def __init__(self) -> None:
        self._seconds: dict[int, dict[int, Second]] = {}
        self._points: dict[str, list[Any]] = {}
        self._is_first = True

    @property
    def needs_since(self) -> int:
        """The second since which the next readings must have their counts, before the present one."""
        return HISTORY_S if self._is_first else _LATE_S

    def state(
        self,
        now: float,
        processes: Sequence[ProcessReading],
        models: Sequence[ModelView],
        instances: Mapping[str, InstanceView],
        blocks: Mapping[str, WorkerBlocks],
        cards: Mapping[str, CardFacts],
        silent_processes: Sequence[str] = (),
    ) -> State:
        """Return the state. The first of the processes is the one that makes the page: instances and the
        events that all see are its own."""
        at = int(now)
        self._take_seconds(processes, at)
        members = _joined_members(processes)
        loads = {name: _load(cards.get(name), members.get(name), blocks.get(name)) for name in instances}
        states: Counter[InstanceState] = Counter(load[0] for load in loads.values())
        models = _with_reachable(models, loads, cards)
        routers = [router for process in processes for router in process.routers]
        minute = self._sum(at - 1 - LATENCY_S, at - 1)
        problems = find_problems(
            processes, models, states, routers, minute.requests, minute.failures, silent_processes
        )
        return {
            "now": round(now, 1),
            "verdict": verdict(problems, models),
            "problems": problems,
            "figures": self._figures(at, minute, processes, models, states),
            "models": models,
            "routers": [router.model_dump() for router in routers],
            "processes": [process.pid for process in processes],
            "who": instances,
            "loads": loads,
            "points": self._points.copy(),
            "events": _joined_events(processes),
        }

    def _take_seconds(self, processes: Iterable[ProcessReading], at: int) -> None:
        for process in processes:
            for second in process.seconds:
                self._seconds.setdefault(second.at, {})[process.pid] = second
        for old in [known for known in self._seconds if known <= at - HISTORY_S]:
            del self._seconds[old]
            self._points.pop(str(old), None)
        for moment in self._seconds if self._is_first else range(at - _LATE_S, at + 1):
            if moment in self._seconds:
                joined = Second(moment)
                for second in self._seconds[moment].values():
                    joined.add(second)
                self._points[str(moment)] = _point(joined)
        self._is_first = False

    def _sum(self, after: int, at: int) -> Second:
        seconds = (one for second in self._seconds.values() for one in second.values())
        return summed(seconds, after, at)

    def _figures(
        self,
        at: int,
        minute: Second,
        processes: Sequence[ProcessReading],
        models: Sequence[ModelView],
        states: Mapping[InstanceState, int],
    ) -> dict[str, Any]:
        lately = self._sum(at - 1 - RATE_S, at - 1)
        routers = [router for process in processes for router in process.routers]
        prompt_tokens = sum(router.prompt_tokens for router in routers)
        cached_tokens = sum(router.cached_tokens for router in routers)
        return {
            "requests_s": round(lately.requests / RATE_S, 2),
            "tokens_s": round(lately.tokens / RATE_S, 1),
            "failed": sum(minute.failures.values()),
            "ended": minute.requests,
            "in_flight": sum(model.in_flight_count for model in models),
            "queued": sum(model.queued_count for model in models),
            "waiting": sum(process.waiting_count for process in processes),
            "hit_rate": round(cached_tokens / prompt_tokens, 4) if prompt_tokens else None,
            "states": {state: states[state] for state in STATES if states.get(state)},
            "times": {
                name: [_milliseconds(percentile(limits, minute.times.get(name, ()), part)) for part in _PARTS]
                for name, limits in TIMES.items()
            },
        }


def difference(before: State, now: State) -> State:
    """Return what changes a state to the next: small facts whole, and of each table the rows that are new or
    changed, and the keys that are gone."""
    change: State = {name: now[name] for name in ("now", "verdict", "problems", "figures")}
    change |= {name: now[name] for name in _LISTS if now[name] != before[name]}
    for name in _TABLES:
        old, new = before[name], now[name]
        if old is new:
            continue
        rows = {key: row for key, row in new.items() if old.get(key) != row}
        gone = [key for key in old if key not in new]
        if rows or gone:
            change[name] = {"set": rows, "gone": gone}
    return change


def _joined_members(processes: Iterable[ProcessReading]) -> dict[str, tuple[InstanceState, int]]:
    """Return the worst state that a process sees, and the requests of all."""
    joined: dict[str, tuple[InstanceState, int]] = {}
    for process in processes:
        for name, (state, count) in process.members.items():
            known = joined.get(name)
            if known is not None:
                state, count = min(state, known[0], key=STATES.index), count + known[1]
            joined[name] = state, count
    return joined


def _load(
    card: CardFacts | None,
    member: tuple[InstanceState, int] | None,
    blocks: WorkerBlocks | None,
) -> list[Any]:
    """Return the changing part of an instance: state, requests, used and all blocks, cached blocks."""
    state, count = member or ("registered" if card is None else "serving", 0)
    total_blocks = None if card is None else card.total_blocks
    if blocks is None:
        return [state, count, None, total_blocks, None]
    return [state, max(count, blocks.requests), blocks.used, total_blocks, blocks.cached]


def _with_reachable(
    models: Iterable[ModelView], loads: Mapping[str, list[Any]], cards: Mapping[str, CardFacts]
) -> list[ModelView]:
    """Return the models with the numbers of their instances that requests may go to."""
    counts: Counter[str] = Counter()
    for name, facts in cards.items():
        if name in loads and loads[name][0] not in _UNREACHABLE:
            for model in facts.models:
                counts[model] += 1
    return [model._replace(reachable_count=counts[model.name]) for model in models]


def _joined_events(processes: Sequence[ProcessReading]) -> dict[str, list[Any]]:
    return {
        f"{process.pid}.{event.number}": [
            round(event.at, 1),
            event.kind,
            event.subject,
            event.count,
            event.detail,
        ]
        for place, process in enumerate(processes)
        for event in process.events
        if place == 0 or event.kind in OWN_KINDS
    }


def _point(second: Second) -> list[Any]:
    """Return a point of the charts: requests, tokens, failures, and the medians of the measured times."""
    return [
        second.requests,
        round(second.tokens, 1),
        sum(second.failures.values()),
        *(
            _milliseconds(percentile(limits, second.times.get(name, ()), 0.5))
            for name, limits in TIMES.items()
        ),
    ]


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)
