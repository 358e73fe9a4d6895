"""The oracle of ports and barriers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dynamo_redis.names import barrier_prefix, port_key
from faults.oracles.calm import SETTLED_S, Calm
from faults.oracles.exclusive import check
from faults.story import OpenCall, Story

LEASES = {"a": "aa", "b": "bb", "c": "cc"}


class ClockedStory(Story):
    """A story whose clock can be put forward."""

    def __init__(self) -> None:
        self.skipped_s = 0.0
        super().__init__()
        ticks = self.now
        self.now = lambda: ticks() + self.skipped_s
        for process, lease in LEASES.items():
            self.note(process, "started", role="tenant", lease=lease)

    @property
    def whats(self) -> list[str]:
        return [violation.what for violation in check(self.history)]

    # ------------------------------------------------------------------ ports

    def reserve(self, process: str, *ports: int, count: int | None = None) -> str:
        name = f"{process}:{len(self.calls)}"
        asked: dict[str, Any] = {"count": count or len(ports), "first": 20, "end": 30}
        self.call(process, "reserve", {"keys": keys(ports)}, reservation=name, **asked)
        return name

    def release(self, name: str, *ports: int) -> None:
        self.call(name[0], "release", {}, reservation=name, keys=keys(ports))

    def lose(self, name: str, port: int, reason: str = "conflict") -> None:
        self.note(name[0], "lost", key=port_key("h", port), reason=reason, reservation=name)

    def expire(self, process: str, port: int) -> None:
        self.note("observer", "log", kind="x", key=port_key("h", port), lease=LEASES[process])

    def state(self, **ports: Sequence[int]) -> None:
        """Note the final state, by process."""
        records = {
            key: ["{}", LEASES.get(process, process), "1-1"]
            for process, some in ports.items()
            for key in keys(some)
        }
        self.note("runner", "state", server="a", revision="1-1", records=records)

    # ------------------------------------------------------------------ barriers

    def lead(self, process: str, count: int = 2) -> OpenCall:
        asked = {"barrier": "g", "count": count, "timeout_s": 5.0}
        return self.begin(process, "barrier_lead", part=f"{process}1", **asked)

    def join(self, process: str, worker: str, part: str | None = None) -> OpenCall:
        asked = {"barrier": "g", "worker": worker, "timeout_s": 5.0}
        return self.begin(process, "barrier_join", part=part or f"{process} as {worker}", **asked)

    def leave(self, process: str, part: str) -> None:
        self.call(process, "barrier_leave", {}, barrier="g", part=part)

    # ------------------------------------------------------------------ troubles

    def flush(self) -> None:
        self.note("runner", "fault", name="FLUSHALL")
        self.note("runner", "loses", what="data")
        self.note("runner", "healed", name="FLUSHALL")


def keys(ports: Sequence[int]) -> list[str]:
    return [port_key("h", port) for port in ports]


@pytest.fixture
def story() -> ClockedStory:
    return ClockedStory()


# ---------------------------------------------------------------------- ports: right


def test_successive_tenants_are_right(story: ClockedStory) -> None:
    first = story.reserve("a", 20, 21)
    story.reserve("b", 22)
    story.release(first, 20, 21)
    story.reserve("c", 21)
    story.state(b=[22], c=[21])
    assert story.whats == []


def test_port_may_be_taken_during_its_release(story: ClockedStory) -> None:
    name = story.reserve("a", 20)
    releasing = story.begin("a", "release", reservation=name, keys=keys([20]))
    story.reserve("b", 20)
    releasing.ok({})
    story.state(b=[20])
    assert story.whats == []


def test_dead_tenants_give_their_ports_back(story: ClockedStory) -> None:
    story.reserve("a", 20)
    story.note("runner", "killed", process="a", how="SIGKILL")
    story.reserve("b", 20)
    story.state(b=[20])
    assert story.whats == []


def test_late_tenant_is_told_after_lost_data(story: ClockedStory) -> None:
    name = story.reserve("a", 20, 21)
    story.flush()
    story.reserve("b", 20)
    story.lose(name, 20)
    story.release(name, 20, 21)
    story.state(b=[20])
    assert story.whats == []


def test_tenant_whose_lease_ended_is_told(story: ClockedStory) -> None:
    name = story.reserve("a", 20)
    story.note("runner", "frozen", process="a")
    story.expire("a", 20)
    story.reserve("b", 20)
    story.skipped_s = 60.0
    story.note("runner", "thawed", process="a")
    story.lose(name, 20)
    story.release(name, 20)
    story.state(b=[20])
    assert story.whats == []


def test_port_lost_before_its_range_is_reserved_has_no_belief(story: ClockedStory) -> None:
    name = "a:x"
    slow = story.begin("a", "reserve", reservation=name, count=2, first=20, end=30)
    story.flush()
    story.reserve("b", 20)
    story.lose(name, 20)
    slow.ok({"keys": keys([20, 21])})
    story.release(name, 20, 21)
    story.state(b=[20])
    assert story.whats == []


# ---------------------------------------------------------------------- ports: wrong


def _two_tenants(story: ClockedStory) -> None:
    story.release(story.reserve("c", 20), 20)
    name = story.reserve("a", 20)
    story.reserve("b", 20)
    story.release(name, 20)
    story.state(b=[20])


def _loss_reported_late(story: ClockedStory) -> None:
    name = story.reserve("a", 20)
    story.flush()
    story.reserve("b", 20)
    story.skipped_s = 2 * SETTLED_S
    story.lose(name, 20)
    story.release(name, 20)
    story.state(b=[20])


def _loss_never_reported(story: ClockedStory) -> None:
    story.reserve("a", 20)
    story.flush()
    story.reserve("b", 20)
    story.state(b=[20])


def _torn_range(story: ClockedStory) -> None:
    story.reserve("a", 20, 22)
    story.state(a=[20, 22])


def _part_of_a_range(story: ClockedStory) -> None:
    story.reserve("a", 20, 21, count=3)
    story.state(a=[20, 21])


def _outside(story: ClockedStory) -> None:
    story.reserve("a", 29, 30)
    story.state(a=[29, 30])


def _left_by_a_failed_range(story: ClockedStory) -> None:
    story.call("a", "reserve", {}, refused=True, reservation="a:x", count=2, first=20, end=30)
    story.state(a=[20])


def _left_by_the_released(story: ClockedStory) -> None:
    story.release(story.reserve("a", 20), 20)
    story.state(a=[20])


def _left_by_the_dead(story: ClockedStory) -> None:
    story.reserve("a", 20)
    story.note("runner", "killed", process="a", how="SIGKILL")
    story.state(a=[20])


def _left_without_a_tenant(story: ClockedStory) -> None:
    story.state(ff=[20])


def _missing(story: ClockedStory) -> None:
    story.reserve("a", 20)
    story.flush()
    story.state()


def _deleted(story: ClockedStory) -> None:
    name = story.reserve("a", 20)
    story.flush()
    story.lose(name, 20, "deleted")
    story.release(name, 20)
    story.state()


def _lost_to_no_other_tenant(story: ClockedStory) -> None:
    name = story.reserve("a", 20)
    story.flush()
    story.lose(name, 20)
    story.release(name, 20)
    story.state()


def _lost_without_cause(story: ClockedStory) -> None:
    story.release(story.reserve("b", 20), 20)
    name = story.reserve("a", 20)
    story.lose(name, 20)
    story.release(name, 20)
    story.state()


Wrong = Callable[[ClockedStory], None]


@pytest.mark.parametrize(
    ("tell", "what"),
    [
        (_two_tenants, "v1/ports/h/20 was b's while it was a's, for"),
        (_loss_reported_late, "v1/ports/h/20 was a's and b's for 13.0 s, and neither was told"),
        (_loss_never_reported, "v1/ports/h/20, which live a holds, stands under lease bb"),
        (_torn_range, "asked for 2 ports of 20-29, was given [20, 22]"),
        (_part_of_a_range, "asked for 3 ports of 20-29, was given [20, 21]"),
        (_outside, "asked for 2 ports of 20-29, was given [29, 30]"),
        (_left_by_a_failed_range, "v1/ports/h/20 stands for a (live), which does not hold it"),
        (_left_by_the_released, "v1/ports/h/20 stands for a (live), which does not hold it"),
        (_left_by_the_dead, "v1/ports/h/20 stands for a (dead), which does not hold it"),
        (_left_without_a_tenant, "v1/ports/h/20 stands for no process (live), which does not hold it"),
        (_missing, "v1/ports/h/20, which live a holds, is missing"),
        (_deleted, "was told that v1/ports/h/20 was deleted; no process deletes another's port"),
        (
            _lost_to_no_other_tenant,
            "was told that v1/ports/h/20 is another's, but no other process had asked for one",
        ),
        (_lost_without_cause, "was told that v1/ports/h/20 is another's, though its lease lived"),
    ],
)
def test_wrong_ports_are_found(story: ClockedStory, tell: Wrong, what: str) -> None:
    tell(story)
    assert len(story.whats) == 1, story.whats
    assert story.whats[0].startswith(what)


# ---------------------------------------------------------------------- barriers: right


def complete(story: ClockedStory) -> None:
    """a leads, b and c come; all go on, and stay."""
    leading, one, two = story.lead("a"), story.join("b", "w1"), story.join("c", "w2")
    one.ok({"data": "a1"})
    leading.ok({"workers": ["w1", "w2"]})
    two.ok({"data": "a1"})


def leave_all(story: ClockedStory) -> None:
    for process, part in (("a", "a1"), ("b", "b as w1"), ("c", "c as w2")):
        story.leave(process, part)


def test_barrier_members_go_on_together(story: ClockedStory) -> None:
    complete(story)
    leave_all(story)
    story.state()
    assert story.whats == []


def test_duplicate_and_late_members_are_refused(story: ClockedStory) -> None:
    complete(story)
    story.join("d", "w1").refused({"reason": "barrier 'g' has a worker 'w1' already"})
    story.join("d", "w3").refused({"reason": "barrier 'g' was complete before 'w3' came"})
    story.lead("d").refused({"reason": "barrier 'g' has a leader already"})
    leave_all(story)
    assert story.whats == []


def test_watch_may_still_show_a_part_that_just_ended(story: ClockedStory) -> None:
    complete(story)
    story.leave("a", "a1")
    story.skipped_s -= 1.5
    story.join("d", "w3").refused({"reason": "barrier 'g' was complete before 'w3' came"})
    assert story.whats == []


def test_abort_reaches_all_members(story: ClockedStory) -> None:
    leading, one = story.lead("a"), story.join("b", "w1")
    leading.refused({"reason": "barrier 'g': 1 of 2 workers came within 5 s"})
    one.refused({"reason": "barrier 'g' was aborted: barrier 'g': 1 of 2 workers came within 5 s"})
    assert story.whats == []


def test_worker_that_dies_at_completion_may_be_counted(story: ClockedStory) -> None:
    leading, one = story.lead("a"), story.join("b", "w1")
    story.join("c", "w2")
    story.note("runner", "killed", process="c", how="SIGKILL")
    leading.ok({"workers": ["w1", "w2"]})
    one.ok({"data": "a1"})
    assert story.whats == []


def test_leader_with_lost_answer_may_have_released_workers(story: ClockedStory) -> None:
    leading, one, two = story.lead("a"), story.join("b", "w1"), story.join("c", "w2")
    story.flush()
    one.ok({"data": "a1"})
    two.ok({"data": "a1"})
    leading.refused({"reason": "barrier 'g': another leader has taken its place"})
    assert story.whats == []


# ---------------------------------------------------------------------- barriers: wrong


def _data_of_no_leader(story: ClockedStory) -> None:
    complete(story)
    story.join("d", "w1").ok({"data": "x1"})


def _not_counted(story: ClockedStory) -> None:
    complete(story)
    story.join("d", "w3").ok({"data": "a1"})


def _two_of_one_id(story: ClockedStory) -> None:
    complete(story)
    story.join("d", "w1").ok({"data": "a1"})


def _too_few(story: ClockedStory) -> None:
    leading, one = story.lead("a"), story.join("b", "w1")
    leading.ok({"workers": ["w1"]})
    one.refused({"reason": "time is over"})


def _never_came(story: ClockedStory) -> None:
    leading, one = story.lead("a"), story.join("b", "w1")
    leading.ok({"workers": ["w1", "w2"]})
    one.refused({"reason": "time is over"})


def _too_early(story: ClockedStory) -> None:
    story.lead("a")
    story.join("b", "w1").ok({"data": "a1"})


def _though_given_up(story: ClockedStory) -> None:
    leading, one = story.lead("a"), story.join("b", "w1")
    story.join("c", "w2")
    leading.refused({"reason": "time is over"})
    one.ok({"data": "a1"})


def _no_duplicate(story: ClockedStory) -> None:
    complete(story)
    leave_all(story)
    story.join("d", "w1").refused({"reason": "barrier 'g' has a worker 'w1' already"})


def _no_other_leader(story: ClockedStory) -> None:
    story.lead("a").refused({"reason": "barrier 'g' has a leader already"})


def _no_abort(story: ClockedStory) -> None:
    complete(story)
    leave_all(story)
    story.skipped_s = 5.0
    story.join("d", "w3").refused({"reason": "barrier 'g' was aborted: time is over"})


def _not_complete(story: ClockedStory) -> None:
    story.lead("a").refused({"reason": "time is over"})
    story.join("b", "w1").refused({"reason": "barrier 'g' was complete before 'w1' came"})


def _waits_for_ever(story: ClockedStory) -> None:
    story.join("b", "w1")
    story.skipped_s = 60.0
    story.state()


def _left(story: ClockedStory) -> None:
    records: dict[str, Any] = {f"{barrier_prefix('g')}data": ["{}", "aa", "1-1"]}
    story.note("runner", "state", server="a", revision="1-1", records=records)


@pytest.mark.parametrize(
    ("tell", "what"),
    [
        (_data_of_no_leader, "w1 saw x1, which no leader had published"),
        (_not_counted, "w3 completed the round of a1, whose leader counted ['w1', 'w2']"),
        (_two_of_one_id, "w1 completed the round of a1 twice, in b and d"),
        (_too_few, "counted ['w1'] where it waits for 2"),
        (_never_came, "counted ['w1', 'w2'] where it waits for 2; of these w2 never came"),
        (_too_early, "w1 completed the round of a1 when 1 of 2 workers had come"),
        (_though_given_up, "w1 completed the round of a1, whose leader gave up"),
        (_no_duplicate, "was told \"barrier 'g' has a worker 'w1' already\", which is not true"),
        (_no_other_leader, "was told \"barrier 'g' has a leader already\", which is not true"),
        (_no_abort, "was told \"barrier 'g' was aborted: time is over\", which is not true"),
        (_not_complete, "was told \"barrier 'g' was complete before 'w1' came\", which is not true"),
        (_waits_for_ever, "waited 61.0 s in a barrier with 5.0 s to wait"),
        (_left, "v1/barrier/g/data stands, but all members have left"),
    ],
)
def test_wrong_barriers_are_found(story: ClockedStory, tell: Wrong, what: str) -> None:
    tell(story)
    assert story.whats == [what]


# ---------------------------------------------------------------------- calm


def test_calm_comes_after_the_last_trouble_of_the_processes(story: ClockedStory) -> None:
    story.note("runner", "fault", name="cut")  # at 4
    story.note("runner", "healed", name="cut")  # 5
    story.note("runner", "frozen", process="a")  # 6
    story.skipped_s = 20.0
    story.note("runner", "thawed", process="a")  # 27
    story.note("runner", "frozen", process="b")  # 28, for good
    calm = Calm(story.history)
    assert calm.settled_after(1.0) == 5.0 + SETTLED_S
    assert calm.settled_after(6.0) == 6.0 + SETTLED_S
    assert calm.settled_after(1.0, "a") == 27.0 + SETTLED_S
    assert calm.settled_after(1.0, "b") == 5.0 + SETTLED_S
    assert calm.settled_after(25.0, "b") == float("inf")
    assert calm.stopped_s("a", 10.0, 30.0) == 17.0
    assert calm.troubled(4.5, 4.6)
    assert not calm.troubled(5.5, 40.0)
    assert calm.troubled(5.5, 40.0, "a")
