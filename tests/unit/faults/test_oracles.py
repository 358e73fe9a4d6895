"""The small oracles: objects, chats, members; and their common parts: losses and fates."""

from __future__ import annotations

from typing import Any

import pytest

from faults.oracles import ORACLES, chats, members, objects, served
from faults.oracles.fates import Fates
from faults.oracles.losses import Losses
from faults.oracles.violation import Violation
from faults.story import Story


def whats(violations: list[Violation]) -> list[str]:
    return [violation.what for violation in violations]


@pytest.fixture
def story() -> Story:
    return Story()


def test_empty_history_is_right(story: Story) -> None:
    assert [check(story.history) for check in ORACLES.values()] == [[]] * len(ORACLES)


# ---------------------------------------------------------------------- objects


def put(story: Story, sha256: str) -> None:
    story.call("u", "object_put", {}, name="o", sha256=sha256, size_bytes=1)


def read(story: Story, sha256: str | None) -> None:
    story.call("r", "object_get", {"sha256": sha256}, name="o")


def test_read_during_a_put_may_show_old_or_new_version(story: Story) -> None:
    read(story, None)
    put(story, "old")
    slow = story.begin("u", "object_put", name="o", sha256="new", size_bytes=1)
    read(story, "old")
    read(story, "new")
    slow.ok({})
    read(story, "new")
    story.call("u", "object_remove", {}, name="o")
    read(story, None)
    assert objects.check(story.history) == []


def test_put_of_unknown_outcome_may_show_late(story: Story) -> None:
    put(story, "old")
    story.begin("u", "object_put", name="o", sha256="new", size_bytes=1)
    read(story, "old")
    read(story, "new")
    assert objects.check(story.history) == []


def test_mixture_of_versions_is_found(story: Story) -> None:
    put(story, "old")
    put(story, "new")
    read(story, "half old, half new")
    assert whats(objects.check(story.history)) == [
        "o was read as half old, half new, which no call had begun to put"
    ]


def test_read_of_an_old_version_is_found(story: Story) -> None:
    put(story, "old")
    put(story, "new")
    read(story, "old")
    assert whats(objects.check(story.history)) == ["o was read as old, which new had replaced"]


def test_later_reader_must_see_the_version_of_an_earlier_one(story: Story) -> None:
    put(story, "old")
    story.begin("u", "object_put", name="o", sha256="new", size_bytes=1)
    read(story, "new")
    read(story, "old")
    assert whats(objects.check(story.history)) == ["o was read as old, which new had replaced"]


def test_missing_object_is_found(story: Story) -> None:
    put(story, "old")
    read(story, None)
    assert whats(objects.check(story.history)) == ["o was not there, though it had been put"]


def test_object_may_go_with_lost_data(story: Story) -> None:
    put(story, "old")
    story.note("runner", "loses", what="data")
    read(story, None)
    assert objects.check(story.history) == []


# ---------------------------------------------------------------------- chats


def test_answered_chats_are_right(story: Story) -> None:
    story.call("c", "chat", {"text": "hello"}, prompt="hi")
    story.begin("c", "chat", prompt="under way when the run ended")
    assert chats.check(story.history) == []


def test_failed_chat_is_found(story: Story) -> None:
    story.call("c", "chat", {"error": "NoInstances"}, refused=True, prompt="hi")
    assert whats(chats.check(story.history)) == ["a chat failed: NoInstances"]


def test_hanging_chat_is_found(story: Story) -> None:
    story.begin("c", "chat", prompt="hi")
    story.call("c", "chat", {"text": "hello"}, prompt="hi again")
    assert whats(chats.check(story.history)) == ["a chat was never answered"]


def test_chat_of_a_killed_caller_may_hang(story: Story) -> None:
    story.begin("c", "chat", prompt="hi")
    story.note("runner", "killed", process="c", how="SIGKILL")
    story.note("runner", "state", server="a", revision="1-1", records={})
    assert chats.check(story.history) == []


# ---------------------------------------------------------------------- members


def deployment(story: Story) -> None:
    for process, lease in (("w1", "1e"), ("w2", "2e")):
        story.note(process, "started", role="worker", lease=lease)
    story.note("c", "members", ids=[])
    story.note("c", "members", ids=["1e", "2e"])
    story.note("runner", "killed", process="w2", how="power off")


def test_table_of_the_live_workers_is_right(story: Story) -> None:
    deployment(story)
    story.note("c", "members", ids=["1e"])
    assert members.check(story.history) == []


def test_emptied_table_is_found(story: Story) -> None:
    deployment(story)
    story.note("c", "members", ids=[])
    story.note("c", "members", ids=["1e"])
    assert whats(members.check(story.history)) == ["the table of c was emptied, while 1 workers lived on"]


def test_wrong_final_table_is_found(story: Story) -> None:
    deployment(story)
    story.note("c", "members", ids=["2e"])
    assert whats(members.check(story.history)) == ["the table of c lacks live 1e, holds dead 2e"]


# ---------------------------------------------------------------------- losses and fates


def test_loss_lasts_until_its_own_fault_is_healed(story: Story) -> None:
    story.note("runner", "fault", name="failover")  # at 1
    story.note("runner", "loses", what="tail")  # 2
    story.note("runner", "healed", name="freeze")  # 3, another fault's
    story.note("runner", "healed", name="failover")  # 4
    story.note("runner", "fault", name="trim")  # 5
    story.note("runner", "loses", what="log")  # 6, no loss of values
    story.note("runner", "fault", name="wipe")  # 7
    story.note("runner", "loses", what="data")  # 8, never healed
    losses = Losses(story.history)
    assert losses.windows == [(2.0, 4.0), (8.0, 8.0)]
    infinity = float("inf")
    assert losses.stretches() == [(-infinity, 2.0), (4.0, 8.0), (8.0, infinity)]
    assert losses.between(3.0, 3.5)
    assert not losses.between(4.5, 7.5)


def test_overlapping_losses_are_one(story: Story) -> None:
    for name in ("one", "other"):
        story.note("runner", "fault", name=name)
        story.note("runner", "loses", what="data")
    story.note("runner", "healed", name="one")
    story.note("runner", "healed", name="other")
    assert Losses(story.history).windows == [(2.0, 6.0)]


def test_last_fate_of_a_process_counts(story: Story) -> None:
    for process in ("a", "b", "c"):
        story.note(process, "started", role="worker", lease=f"{process}e")
    story.note("runner", "frozen", process="a")
    story.note("runner", "thawed", process="a")
    story.note("runner", "frozen", process="b")
    story.note("runner", "killed", process="c", how="SIGKILL")
    fates = Fates(story.history)
    assert [fates.of(process) for process in "abcd"] == ["live", "stopped", "dead", "live"]
    assert fates.leases["a"] == {"ae"}
    assert fates.is_present("a")
    story.note("runner", "alive", process="d")
    assert not Fates(story.history).is_present("a")
    assert Fates(story.history).vanished() == ["a"]


# ---------------------------------------------------------------------- served calls


def fails(story: Story, action: str, *, process: str = "w") -> None:
    """Add a call whose caller is told of an error: its outcome stays unknown."""
    call = story.begin(process, action, key="a")
    call.fails({"error": "StoreRefused: out of memory"})


def during(story: Story, name: str = "full", **fields: Any) -> None:
    story.note("runner", "fault", name=name, **fields)


def test_failed_read_beside_a_fault_is_found(story: Story) -> None:
    fails(story, "get")
    during(story, serves=["get"])
    fails(story, "put")
    fails(story, "get")
    story.note("runner", "healed", name="full")
    fails(story, "get")
    assert whats(served.check(story.history)) == [
        "get failed during 'full': StoreRefused: out of memory",
    ]


def test_fault_may_have_to_leave_all_calls_alone(story: Story) -> None:
    during(story, "slow", serves=["*"])
    fails(story, "put")
    story.begin("w", "put", key="a")  # under way when the run ended
    assert whats(served.check(story.history)) == ["put failed during 'slow': StoreRefused: out of memory"]


def test_calls_of_stopped_processes_may_fail(story: Story) -> None:
    story.note("runner", "frozen", process="w")
    during(story, serves=["get"])
    fails(story, "get")
    assert served.check(story.history) == []


def test_fault_that_lasts_after_its_end_is_found(story: Story) -> None:
    during(story, "handed over", back_s=2.0)
    story.note("runner", "healed", name="handed over")
    fails(story, "put")
    fails(story, "put")
    fails(story, "get")
    assert whats(served.check(story.history)) == [
        "get failed more than 2 s after 'handed over': StoreRefused: out of memory"
    ]


def test_process_that_cannot_join_is_found(story: Story) -> None:
    during(story)
    story.note("runner", "joining", process="late", fault="full", sign="watch")
    story.note("late", "started", role="watcher")
    story.note("runner", "healed", name="full")
    story.note("late", "watch", watch="late/1", prefix="", revision="1-1", resync=None, events=[])
    assert whats(served.check(story.history)) == ["late was not served while 'full' lasted"]


def test_process_that_joins_in_time_is_right(story: Story) -> None:
    during(story)
    story.note("runner", "joining", process="late", fault="full", sign="started")
    story.note("late", "started", role="frontend")
    story.note("runner", "healed", name="full")
    assert served.check(story.history) == []
