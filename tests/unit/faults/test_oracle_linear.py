"""The linearizability oracle: histories that fit an order and those that do not. It decides as an exhaustive
search."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.history import Call, History
from faults.oracles.linear import check, operations_on, partition
from faults.oracles.registers import ABSENT, Cell, Operation, join, operation_of
from faults.oracles.search import Search
from faults.story import Story

INFINITY = float("inf")


def whats(story: Story) -> list[str]:
    return [violation.what for violation in check(story.history)]


def put(story: Story, value: str, revision: int, process: str = "p", key: str = "k") -> None:
    story.call(process, "put", {"revision": f"1-{revision}"}, key=key, value=value)


def get(story: Story, value: str | None, revision: int | None, process: str = "p", key: str = "k") -> None:
    at = None if revision is None else f"1-{revision}"
    story.call(process, "get", {"value": value, "revision": at}, key=key)


@pytest.fixture
def story() -> Story:
    return Story()


# ---------------------------------------------------------------------- right


def test_successive_calls_fit(story: Story) -> None:
    get(story, None, None)
    story.call("p", "create", {"revision": "1-1"}, key="k", value="v1")
    story.call("q", "create", {"exists": True}, refused=True, key="k", value="v2")
    story.call("q", "compare_and_put", {"revision": "1-2"}, key="k", value="v3", expected="1-1")
    story.call("p", "compare_and_put", {"found": "1-2"}, refused=True, key="k", value="v4", expected="1-1")
    get(story, "v3", 2)
    story.call("p", "delete", {"deleted": True}, key="k")
    story.call("q", "delete", {"deleted": False}, key="k")
    story.call("q", "compare_and_put", {"revision": "1-5"}, key="k", value="v5", expected=None)
    assert whats(story) == []


def test_overlapping_calls_may_take_effect_in_either_order(story: Story) -> None:
    slow = story.begin("p", "put", key="k", value="v1")
    put(story, "v2", 2, "q")
    get(story, "v2", 2, "q")
    slow.ok({"revision": "1-1"})
    get(story, "v2", 2)
    assert whats(story) == []


def test_call_of_unknown_outcome_may_take_effect_late(story: Story) -> None:
    put(story, "v1", 1)
    story.begin("q", "put", key="k", value="late")
    get(story, "v1", 1)
    put(story, "v2", 2)
    get(story, "late", 3)
    assert whats(story) == []


def test_call_of_unknown_outcome_may_never_take_effect(story: Story) -> None:
    put(story, "v1", 1)
    story.begin("q", "delete", key="k")
    story.begin("q", "create", key="k", value="v2")
    get(story, "v1", 1)
    assert whats(story) == []


def test_two_calls_of_unknown_outcome_may_explain_one_answer(story: Story) -> None:
    put(story, "v1", 1)
    story.begin("q", "delete", key="k")
    story.begin("r", "create", key="k", value="v2")
    get(story, "v2", 3)
    assert whats(story) == []


def test_transaction_changes_its_keys_at_once(story: Story) -> None:
    put(story, "a1", 1, key="a")
    compares, puts = [["a", "1-1"], ["b", None]], [["a", "a2"], ["b", "b2"]]
    story.call("p", "transact", {"revision": "1-3"}, compares=compares, puts=puts, deletes=[])
    found = {"key": "b", "found": "1-3"}
    story.call(
        "q", "transact", found, refused=True, compares=[["a", "1-2"], ["b", None]], puts=[], deletes=[]
    )
    get(story, "a2", 2, key="a")
    get(story, "b2", 3, key="b")
    assert whats(story) == []


def test_calls_after_a_loss_must_fit_from_an_unknown_state(story: Story) -> None:
    put(story, "v1", 1)
    put(story, "v2", 2)
    story.note("runner", "fault", name="failover")
    story.note("runner", "loses", what="tail")
    torn = story.begin("q", "put", key="k", value="v3")
    story.note("runner", "healed", name="failover")
    get(story, "v1", 1)
    torn.ok({"revision": "1-9"})
    get(story, "v1", 1)
    assert whats(story) == []
    get(story, "v2", 2)
    assert whats(story) != []


# ---------------------------------------------------------------------- wrong


def _stale_read(story: Story) -> None:
    put(story, "v1", 1)
    put(story, "v2", 2)
    get(story, "v1", 1)


def _double_create(story: Story) -> None:
    story.call("p", "create", {"revision": "1-1"}, key="k", value="v1")
    story.call("q", "create", {"revision": "1-2"}, key="k", value="v2")


def _create_refused_to_its_only_creator(story: Story) -> None:
    story.call("p", "create", {"exists": True}, refused=True, key="k", value="v1")


def _lost_update(story: Story) -> None:
    put(story, "v1", 1)
    for process, value, revision in (("p", "v2", 2), ("q", "v3", 3)):
        answer = {"revision": f"1-{revision}"}
        story.call(process, "compare_and_put", answer, key="k", value=value, expected="1-1")


def _lost_write(story: Story) -> None:
    put(story, "v1", 1)
    get(story, None, None)


def _compare_with_the_wrong_revision(story: Story) -> None:
    put(story, "v1", 1)
    story.call("q", "compare_and_put", {"revision": "1-2"}, key="k", value="v2", expected="1-7")


def _refused_though_it_matched(story: Story) -> None:
    put(story, "v1", 1)
    story.call("q", "compare_and_put", {"found": "1-5"}, refused=True, key="k", value="v2", expected="1-1")


def _found_what_it_expected(story: Story) -> None:
    put(story, "v1", 1)
    story.call("q", "compare_and_put", {"found": "1-1"}, refused=True, key="k", value="v2", expected="1-1")


def _written_twice(story: Story) -> None:
    get(story, None, None)
    slow = story.begin("p", "put", key="k", value="v1")
    get(story, "v1", 1, "q")
    slow.ok({"revision": "1-2"})


def _deleted_what_was_not_there(story: Story) -> None:
    story.call("p", "delete", {"deleted": True}, key="k")


def _half_a_transaction(story: Story) -> None:
    puts = [["a", "a1"], ["b", "b1"]]
    slow = story.begin("p", "transact", compares=[], puts=puts, deletes=[])
    get(story, "b1", 2, "q", key="b")
    get(story, None, None, "q", key="a")
    slow.ok({"revision": "1-2"})


def _half_a_transaction_of_unknown_outcome(story: Story) -> None:
    story.begin("p", "transact", compares=[], puts=[["a", "a1"], ["b", "b1"]], deletes=[])
    get(story, "b1", 2, "q", key="b")
    get(story, None, None, "q", key="a")


def _read_before_it_was_written(story: Story) -> None:
    get(story, "v1", 1)
    put(story, "v1", 1)


def _revisions_fall(story: Story) -> None:
    put(story, "v1", 5, key="a")
    put(story, "v2", 4, key="b")


WRONG: tuple[Callable[[Story], None], ...] = (
    _stale_read,
    _double_create,
    _create_refused_to_its_only_creator,
    _lost_update,
    _lost_write,
    _compare_with_the_wrong_revision,
    _refused_though_it_matched,
    _found_what_it_expected,
    _written_twice,
    _deleted_what_was_not_there,
    _half_a_transaction,
    _half_a_transaction_of_unknown_outcome,
    _read_before_it_was_written,
    _revisions_fall,
)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__.strip("_"))
def test_calls_that_fit_no_order_are_found(story: Story, wrong: Callable[[Story], None]) -> None:
    wrong(story)
    assert whats(story) != []


def test_violation_shows_the_calls_around_the_misfit(story: Story) -> None:
    _stale_read(story)
    (violation,) = check(story.history)
    assert "get of k fits nowhere: 2 of 3 calls fit one order, after which k was v2 @ 1-2" in str(violation)
    assert '#2: get {"key": "k"} → ok {"value": "v1", "revision": "1-1"}' in violation.report()


# ---------------------------------------------------------------------- made by a real register


class Registers:
    """The registry's rules in a few lines: `apply` returns a call's (outcome, answer)."""

    def __init__(self) -> None:
        self._cells: dict[str, tuple[str, str]] = {}
        self._revision = 0

    def revision_of(self, key: str) -> str | None:
        cell = self._cells.get(key)
        return None if cell is None else cell[1]

    def _put(self, key: str, value: str) -> dict[str, str]:
        self._revision += 1
        self._cells[key] = (value, f"1-{self._revision}")
        return {"revision": f"1-{self._revision}"}

    def apply(self, action: str, said: dict[str, Any]) -> tuple[Any, Any]:
        if action == "transact":
            return self._transact(said)
        key = said["key"]
        there = self._cells.get(key)
        match action:
            case "get":
                value, revision = there or (None, None)
                return "ok", {"value": value, "revision": revision}
            case "delete":
                self._revision += there is not None
                self._cells.pop(key, None)
                return "ok", {"deleted": there is not None}
            case "create" if there is not None:
                return "refused", {"exists": True}
            case "compare_and_put" if self.revision_of(key) != said["expected"]:
                return "refused", {"found": self.revision_of(key)}
            case _:
                return "ok", self._put(key, said["value"])

    def _transact(self, said: dict[str, Any]) -> tuple[Any, Any]:
        for key, expected in said["compares"]:
            if self.revision_of(key) != expected:
                return "refused", {"key": key, "found": self.revision_of(key)}
        for key, value in said["puts"]:
            self._put(key, value)
        for key in said["deletes"]:
            self._revision += self._cells.pop(key, None) is not None
        return "ok", {"revision": f"1-{self._revision}"}


ACTIONS = ("get", "get", "get", "put", "create", "compare_and_put", "delete")


def make_history(
    rng: random.Random, count: int, *, keys: int = 3, processes: int = 5, transactions: bool = False
) -> History:
    """Return a right history: calls take effect one by one, at a moment within each. Some answers are lost:
    those calls take effect at once, much later, or never."""
    registers = Registers()
    free_at = [0.0] * processes
    late: list[tuple[str, dict[str, Any]]] = []
    calls: list[Call] = []
    now = 0.0
    for number in range(count):
        process = rng.randrange(processes)
        began_at = max(free_at[process], now - rng.uniform(0, 3))
        now = max(now, began_at) + rng.uniform(0, 1)
        ended_at = free_at[process] = now + rng.uniform(0, 3)
        if late and rng.random() < 0.2:
            registers.apply(*late.pop(rng.randrange(len(late))))
        action = rng.choice((*ACTIONS, "transact") if transactions else ACTIONS)
        said = _arguments(rng, action, number, keys, registers)
        outcome: Any = "unknown"
        answer = None
        if rng.random() > 0.05:
            outcome, answer = registers.apply(action, said)
        else:
            ended_at = INFINITY
            if rng.random() < 0.6:
                late.append((action, said))
        calls.append(Call(f"p{process}", number, action, said, began_at, ended_at, outcome, answer))
    return History(sorted(calls, key=lambda call: call.began_at))


def _arguments(
    rng: random.Random, action: str, number: int, keys: int, registers: Registers
) -> dict[str, Any]:
    key, other = (f"k{rng.randrange(keys)}" for _ in range(2))
    expected = rng.choice((registers.revision_of(key), registers.revision_of(key), None, "1-0"))
    if action == "transact":
        puts = [[name, f"v{number}{name}"] for name in dict.fromkeys((key, other))]
        deletes = rng.choice(([], [f"k{keys}"]))
        return {"compares": [[key, expected]], "puts": puts, "deletes": deletes}
    return {"key": key, "value": f"v{number}", "expected": expected}


def mutate(rng: random.Random, history: History) -> History:
    """Return the same history, in which one read has another one's answer."""
    reads = [
        index
        for index, call in enumerate(history.calls)
        if call.action == "get" and call.outcome == "ok" and call.answer["value"]
    ]
    one = rng.choice(reads)
    other = rng.choice([index for index in reads if history.calls[index].answer != history.calls[one].answer])
    calls = [*history.calls]
    calls[one] = dataclasses.replace(
        calls[one],
        arguments={"key": history.calls[other].arguments["key"]},
        answer=history.calls[other].answer,
    )
    return History(calls)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_calls_of_real_registers_fit(seed: int, transactions: bool) -> None:
    assert check(make_history(random.Random(seed), 100, transactions=transactions)) == []


def test_most_reads_of_another_time_do_not_fit() -> None:
    rng = random.Random(7)
    seen = sum(bool(check(mutate(rng, make_history(rng, 120)))) for _ in range(60))
    assert seen >= 45  # the other reads happen to fit


def test_thousands_of_calls_are_judged_at_once() -> None:
    history = make_history(random.Random(3), 5000, keys=8, processes=12)
    began_at = time.monotonic()
    assert check(history) == []
    assert time.monotonic() - began_at < 10


# ---------------------------------------------------------------------- against all orders


def fits_by_trial(answered: Sequence[Operation], unknown: Sequence[Operation]) -> bool:
    """Try every order of the answered and of each choice of the unknown calls."""
    return any(
        _fits(order)
        for count in range(len(unknown) + 1)
        for chosen in itertools.combinations(unknown, count)
        for order in itertools.permutations([*answered, *chosen])
    )


def _fits(order: Sequence[Operation]) -> bool:
    cells: dict[str, Cell] = {}
    for index, operation in enumerate(order):
        if any(later.call.ended_at < operation.call.began_at for later in order[index + 1 :]):
            return False
        for key, demanded in operation.demands:
            joined = join(cells.get(key, ABSENT), demanded)
            if joined is None:
                return False
            cells[key] = joined
        cells.update(operation.effects)
    revisions = [int(one.revision.partition("-")[2]) for one in order if one.revision is not None]
    return revisions == sorted(revisions)


def split(calls: Sequence[Call]) -> tuple[list[Operation], list[Operation]]:
    """Return the answered ones, and those of unknown outcome."""
    operations = [operation_of(call) for call in calls]
    return (
        [operation for operation in operations if operation.call.outcome != "unknown"],
        [operation for operation in operations if operation.call.outcome == "unknown"],
    )


@st.composite
def tiny_calls(draw: st.DrawFn, keys: str) -> list[Call]:
    """Draw up to five calls, whose answers need not fit. On several keys some are transactions."""
    return [_tiny_call(draw, number, keys) for number in range(draw(st.integers(1, 5)))]


def _tiny_call(draw: st.DrawFn, number: int, keys: str) -> Call:
    began_at = draw(st.integers(0, 8)) * 2.0
    ended_at = began_at + 1 + draw(st.integers(0, 4)) * 2.0
    actions = [
        "get",
        "put",
        "create",
        "delete",
        "compare_and_put",
        *(["transact"] * 3 if len(keys) > 1 else []),
    ]
    action = draw(st.sampled_from(actions))
    seen = draw(st.sampled_from((None, 0, 1, 2)))
    expected = None if seen is None else f"1-{seen}"
    arguments: dict[str, Any] = {"key": draw(st.sampled_from(keys))}
    outcome: Any = "ok"
    answer: dict[str, Any] = {"revision": f"1-{number}"}
    match action:
        case "get":
            answer = {"value": None if seen is None else f"v{seen}", "revision": expected}
        case "delete":
            answer = {"deleted": seen is not None}
        case "transact":
            puts, deletes = draw(st.sampled_from((("a", "b"), ("ab", ""), ("b", ""))))
            arguments = {
                "compares": [["a", expected]] if draw(st.booleans()) else [],
                "puts": [[key, f"v{number}"] for key in puts],
                "deletes": list(deletes),
            }
        case _:
            arguments |= {"value": f"v{number}", "expected": expected}
    if action == "create" and draw(st.booleans()):
        outcome, answer = "refused", {"exists": True}
    if action != "get" and draw(st.integers(0, 3)) == 0:
        outcome, answer, ended_at = "unknown", {}, INFINITY
    return Call("p", number, action, arguments, began_at, ended_at, outcome, answer)


@settings(max_examples=150, deadline=None)
@given(tiny_calls("k"))
def test_search_equals_exhaustive_search(calls: list[Call]) -> None:
    answered, unknown = split(calls)
    assert Search(["k"], answered, unknown, ABSENT).run().found == fits_by_trial(answered, unknown)


@settings(max_examples=150, deadline=None)
@given(tiny_calls("ab"))
def test_search_of_joined_keys_equals_exhaustive_search(calls: list[Call]) -> None:
    answered, unknown = split(calls)
    assert Search(["a", "b"], answered, unknown, ABSENT).run().found == fits_by_trial(answered, unknown)


@settings(max_examples=150, deadline=None)
@given(st.one_of(tiny_calls("k"), tiny_calls("ab")))
def test_oracle_accepts_only_calls_that_fit_an_order(calls: list[Call]) -> None:
    history = History(sorted(calls, key=lambda call: call.began_at))
    if check(history):
        return
    answered, unknown = split(calls)
    for keys in partition([*answered, *unknown]):  # keys that no transaction joins have an order each
        assert fits_by_trial(operations_on(keys, answered), operations_on(keys, unknown))
