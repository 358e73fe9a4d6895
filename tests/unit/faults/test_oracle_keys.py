"""The oracle of registered keys: the valid final states, and each kind of violation."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from faults.oracles.keys import check
from faults.story import Story

KEY = "instances/w1/0"


def whats(story: Story) -> list[str]:
    return [violation.what for violation in check(story.history)]


def finish(story: Story, records: dict[str, list[str | None]], *alive: str) -> None:
    story.note("runner", "state", server="a", revision="1-9", records=records)
    for process in alive:
        story.note("runner", "alive", process=process)


@pytest.fixture
def story() -> Story:
    """Return a story of two workers, of which the first has registered a key."""
    told = Story()
    for process, lease in (("w1", "1e"), ("w2", "2e")):
        told.note(process, "started", role="worker", lease=lease)
    told.call("w1", "register", {}, key=KEY, value="v1", exclusive=False)
    return told


# ---------------------------------------------------------------------- right


def test_key_of_a_live_worker_stands(story: Story) -> None:
    story.call("w1", "update", {"revision": "1-4"}, key=KEY, value="v2")
    finish(story, {KEY: ["v2", "1e", "1-4"], "data/x": ["v", None, "1-5"]}, "w1", "w2")
    assert whats(story) == []


@pytest.mark.parametrize("value", ["v1", "v2"])
def test_update_of_unknown_outcome_leaves_either_value(story: Story, value: str) -> None:
    story.begin("w1", "update", key=KEY, value="v2")
    finish(story, {KEY: [value, "1e", "1-4"]}, "w1", "w2")
    assert whats(story) == []


def test_later_update_settles_one_of_unknown_outcome(story: Story) -> None:
    story.begin("w1", "update", key=KEY, value="v2")
    story.call("w1", "update", {"revision": "1-5"}, key=KEY, value="v3")
    finish(story, {KEY: ["v2", "1e", "1-4"]}, "w1", "w2")
    assert whats(story) == [f"{KEY} of live w1 holds v2; it should hold v3"]


@pytest.mark.parametrize("is_there", [True, False])
def test_unregistration_of_unknown_outcome_leaves_either(story: Story, is_there: bool) -> None:
    story.begin("w1", "unregister", key=KEY)
    finish(story, {KEY: ["v1", "1e", "1-4"]} if is_there else {}, "w1", "w2")
    assert whats(story) == []


def test_key_of_a_dead_worker_is_gone(story: Story) -> None:
    story.note("runner", "killed", process="w1", how="SIGKILL")
    finish(story, {}, "w2")
    assert whats(story) == []


def test_key_of_a_stopped_worker_may_stand_or_be_gone(story: Story) -> None:
    story.note("runner", "frozen", process="w1")
    finish(story, {}, "w2")
    assert whats(story) == []


def test_deleted_key_is_lost(story: Story) -> None:
    story.call("w2", "delete", {"deleted": True}, key=KEY)
    story.note("w1", "lost", key=KEY, reason="deleted")
    finish(story, {}, "w1", "w2")
    assert whats(story) == []


def test_events_after_the_final_state_are_not_judged(story: Story) -> None:
    finish(story, {KEY: ["v1", "1e", "1-4"]}, "w1", "w2")
    story.call("w1", "unregister", {}, key=KEY)
    assert whats(story) == []


# ---------------------------------------------------------------------- wrong


def _live_workers_key_missing(story: Story) -> None:
    finish(story, {}, "w1", "w2")


def _old_value(story: Story) -> None:
    story.call("w1", "update", {"revision": "1-4"}, key=KEY, value="v2")
    finish(story, {KEY: ["v1", "1e", "1-4"]}, "w1", "w2")


def _still_marked_as_hanging(story: Story) -> None:
    finish(story, {KEY: ["stalled:v1", "1e", "1-4"]}, "w1", "w2")


def _under_another_lease(story: Story) -> None:
    finish(story, {KEY: ["v1", "2e", "1-4"]}, "w1", "w2")


def _under_no_lease(story: Story) -> None:
    finish(story, {KEY: ["v1", None, "1-4"]}, "w1", "w2")


def _dead_workers_key_left(story: Story) -> None:
    story.note("runner", "killed", process="w1", how="SIGKILL")
    finish(story, {KEY: ["v1", "1e", "1-4"]}, "w2")


def _unregistered_key_left(story: Story) -> None:
    story.call("w1", "unregister", {}, key=KEY)
    finish(story, {KEY: ["v1", "1e", "1-4"]}, "w1", "w2")


def _failed_registration_left(story: Story) -> None:
    story.begin("w2", "register", key="instances/w2/0", value="v9", exclusive=False)
    finish(story, {KEY: ["v1", "1e", "1-4"], "instances/w2/0": ["v9", "2e", "1-5"]}, "w1", "w2")


def _key_of_no_process(story: Story) -> None:
    finish(story, {KEY: ["v1", "1e", "1-4"], "instances/x": ["v", "5e", "1-5"]}, "w1", "w2")


def _two_owners(story: Story) -> None:
    story.call("w2", "register", {}, key=KEY, value="v2", exclusive=True)
    finish(story, {KEY: ["v2", "2e", "1-4"]}, "w1", "w2")


def _lost_without_a_cause(story: Story) -> None:
    story.note("w1", "lost", key=KEY, reason="deleted")
    finish(story, {}, "w1", "w2")


def _ended_by_itself(story: Story) -> None:
    finish(story, {KEY: ["v1", "1e", "1-4"]}, "w1")


WRONG: dict[Callable[[Story], None], str] = {
    _live_workers_key_missing: "of live w1 is missing",
    _old_value: "holds v1; it should hold v2",
    _still_marked_as_hanging: "holds stalled:v1; it should hold v1",
    _under_another_lease: "stands under lease 2e, not its own 1e",
    _under_no_lease: "stands under lease None",
    _dead_workers_key_left: "stands, but is not kept; registered by w1 (dead)",
    _unregistered_key_left: "stands, but is not kept; registered by w1 (live)",
    _failed_registration_left: "instances/w2/0 = v9 under lease 2e stands, but is not kept",
    _key_of_no_process: "registered by no process",
    _two_owners: "is kept by w1, w2, and none of them was told",
    _lost_without_a_cause: "but no process took it",
    _ended_by_itself: "w2 was not killed, but was not there at the end",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__.strip("_"))
def test_each_violation_is_found(story: Story, wrong: Callable[[Story], None]) -> None:
    wrong(story)
    said = whats(story)
    assert any(WRONG[wrong] in what for what in said), said
