"""The watch oracle: valid watches that it must accept, and each kind of wrong watch that it must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from faults.oracles.watch import check
from faults.story import Story

Event = list[Any]


class Log:
    """Writes a change log, as an observer would note it, one entry of revision `1-<n>` after the other."""

    def __init__(self, story: Story, incarnation: str = "inc") -> None:
        self._story = story
        self._incarnation = incarnation
        self._branch = ""
        self.last = ["0-0", ""]
        self.entry("i", "")

    def rewind(self, last: list[str]) -> None:
        """Begin a branch behind an entry: the same ids come again, of other operations."""
        self.last, self._branch = last, "other "

    def entry(self, kind: str, key: str, value: str = "", lease: str = "") -> Event:
        """Write the next entry, and return it as a watch shows it."""
        count = int(self.last[0].partition("-")[2]) + 1
        entry_id, operation = f"1-{count}", f"{self._branch}operation {count}"
        self._story.note(
            "observer",
            "log",
            server="a",
            incarnation=self._incarnation,
            id=entry_id,
            operation=operation,
            previous=self.last,
            kind=kind,
            key=key,
            value=value,
            lease=lease,
        )
        self.last = [entry_id, operation]
        if kind == "p":
            return ["put", key, value, entry_id]
        return ["delete", key, entry_id, {"d": "deleted", "r": "revoked", "x": "expired"}.get(kind)]

    def put(self, key: str, value: str, lease: str = "") -> Event:
        return self.entry("p", key, value, lease)


def show(story: Story, *events: Event, revision: str | None = None, resync: str | None = None) -> None:
    """Note a batch of the watch on `a/`."""
    at = revision or events[-1][3 if events[-1][0] == "put" else 2]
    story.note("w", "watch", watch="w/1", prefix="a/", revision=at, resync=resync, events=list(events))


def finish(story: Story, log: Log, records: dict[str, str]) -> None:
    """Note the final state: key → value@revision."""
    split = {key: said.split("@") for key, said in records.items()}
    fields = {key: [value, None, revision] for key, (value, revision) in split.items()}
    story.note("runner", "state", server="a", revision=log.last[0], records=fields)


def whats(story: Story) -> list[str]:
    return [violation.what for violation in check(story.history)]


@pytest.fixture
def story() -> Story:
    return Story()


# ---------------------------------------------------------------------- right


def test_every_change_in_order_is_right(story: Story) -> None:
    log = Log(story)
    one = log.put("a/1", "v1")
    show(story, one, revision=log.last[0])
    log.put("b/1", "not under the prefix")
    two, three = log.put("a/2", "v2"), log.entry("d", "a/1")
    show(story, two)
    show(story, three)
    finish(story, log, {"a/2": f"v2@{two[3]}", "b/1": "not under the prefix@1-3"})
    assert whats(story) == []


def test_expiry_of_a_hidden_record_is_not_shown(story: Story) -> None:
    log = Log(story)
    log.put("a/1", "v1", lease="1e")
    show(story, revision=log.last[0])
    log.entry("x", "a/1", lease="1e")
    show(story, log.put("a/2", "v2"))
    assert whats(story) == []


def test_record_without_a_lease_cannot_be_hidden(story: Story) -> None:
    log = Log(story)
    log.put("a/1", "v1")
    show(story, revision=log.last[0])
    assert len(whats(story)) == 1


def test_resync_across_a_lost_tail_accepts_a_repeated_id(story: Story) -> None:
    log = Log(story)
    show(story, log.put("a/1", "v1"), revision=log.last[0])
    shared = log.last
    show(story, log.put("a/2", "lost"))
    show(story, log.put("a/3", "lost too"))
    log.rewind(shared)
    kept = log.put("a/2", "kept")
    show(story, ["delete", "a/3", kept[3], "resync"], kept, resync="rewound")
    finish(story, log, {"a/1": "v1@1-2", "a/2": "kept@1-3"})
    assert whats(story) == []


def test_resumed_watch_has_no_first_state(story: Story) -> None:
    log = Log(story)
    show(story, log.put("a/1", "v1"))
    story.note("w", "unwatched", watch="w/1", reason="closed")
    start = log.last[0]
    story.note("w", "watching", watch="w/2", prefix="a/", start_revision=start, resumes="w/1")
    event = log.put("a/2", "v2")
    story.note("w", "watch", watch="w/2", prefix="a/", revision=event[3], resync=None, events=[event])
    finish(story, log, {"a/1": f"v1@{start}", "a/2": f"v2@{event[3]}"})
    assert whats(story) == []


def test_watch_of_a_killed_process_may_lag(story: Story) -> None:
    log = Log(story)
    show(story, log.put("a/1", "v1"))
    story.note("runner", "killed", process="w", how="SIGKILL")
    log.put("a/2", "v2")
    finish(story, log, {"a/1": "v1@1-2", "a/2": "v2@1-3"})
    assert whats(story) == []


# ---------------------------------------------------------------------- wrong


def _lost(story: Story, log: Log) -> None:
    log.put("a/lost", "v2")
    show(story, log.put("a/3", "v3"))


def _repeated(story: Story, log: Log) -> None:
    event = log.put("a/2", "v2")
    show(story, event)
    show(story, event)


def _reordered(story: Story, log: Log) -> None:
    two, three = log.put("a/2", "v2"), log.put("a/3", "v3")
    show(story, three, two, revision=three[3])


def _phantom(story: Story, log: Log) -> None:
    show(story, ["put", "a/2", "never", "1-99"])


def _other_value(story: Story, log: Log) -> None:
    event = log.put("a/2", "v2")
    show(story, ["put", "a/2", "v2!", event[3]])


def _other_cause(story: Story, log: Log) -> None:
    event = log.entry("x", "a/1", lease="1e")
    show(story, ["delete", "a/1", event[2], "deleted"])


def _rewound_silently(story: Story, log: Log) -> None:
    shared = list(log.last)
    show(story, log.put("a/2", "lost"))
    log.rewind(shared)
    show(story, log.put("a/3", "v3"))


def _wiped_silently(story: Story, log: Log) -> None:
    show(story, Log(story, "other").put("a/2", "v2"))


def _revision_past_the_last_event(story: Story, log: Log) -> None:
    two, three = log.put("a/2", "v2"), log.put("a/3", "v3")
    show(story, two, revision=three[3])


def _resync_keeps_a_deleted_key(story: Story, log: Log) -> None:
    log.entry("d", "a/1")
    show(story, log.put("a/2", "v2"), resync="trimmed")


def _resync_leaves_out(story: Story, log: Log) -> None:
    log.put("a/2", "v2")
    show(story, log.put("a/3", "v3"), resync="trimmed")


def _resync_repeats_a_value(story: Story, log: Log) -> None:
    show(story, ["put", "a/1", "v1", "1-2"], resync="trimmed")


def _resync_shows_an_old_value(story: Story, log: Log) -> None:
    old, _ = log.put("a/2", "v2"), log.put("a/2", "v3")
    show(story, old, revision=log.last[0], resync="trimmed")


def _resync_of_no_revision(story: Story, log: Log) -> None:
    show(story, revision="1-99", resync="trimmed")


def _deletes_an_unknown_key(story: Story, log: Log) -> None:
    show(story, ["delete", "a/9", "1-2", "resync"], resync="trimmed")


def _behind_in_the_end(story: Story, log: Log) -> None:
    log.put("a/2", "v2")
    finish(story, log, {"a/1": "v1@1-2", "a/2": "v2@1-3"})


def _state_differs_from_the_log(story: Story, log: Log) -> None:
    finish(story, log, {"a/1": "v1@1-1"})


WRONG: dict[Callable[[Story, Log], None], str] = {
    _lost: "without 1-3 put a/lost = v2 before it",
    _repeated: "again",
    _reordered: "without 1-3 put a/2 = v2 before it",
    _phantom: "which the log does not have",
    _other_value: "which the log does not have",
    _other_cause: "which the log does not have",
    _rewound_silently: "on another line of history, without a resync",
    _wiped_silently: "on another line of history, without a resync",
    _revision_past_the_last_event: "never showed 1-4 put a/3 = v3",
    _resync_keeps_a_deleted_key: "did not show that a/1 is gone",
    _resync_leaves_out: "did not show 1-3 put a/2 = v2",
    _resync_repeats_a_value: "which it had shown before",
    _resync_shows_an_old_value: "but the truth was 1-4 put a/2 = v3",
    _resync_of_no_revision: "which the log never had",
    _deletes_an_unknown_key: "though it had never shown that key",
    _behind_in_the_end: "differs from the server in the end: a/2 = None, on the server v2",
    _state_differs_from_the_log: "log and state of server a differ",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__.strip("_"))
def test_wrong_watch_is_found(story: Story, wrong: Callable[[Story, Log], None]) -> None:
    log = Log(story)
    show(story, log.put("a/1", "v1", lease="1e"), revision=log.last[0])
    wrong(story, log)
    said = whats(story)
    assert any(WRONG[wrong] in what for what in said), said


def test_hole_in_the_truth_is_reported(story: Story) -> None:
    log = Log(story)
    log.last = ["1-5", "unseen"]
    log.put("a/1", "v1")
    assert "cannot be judged" in whats(story)[0]


def test_silent_watch_is_found(story: Story) -> None:
    log = Log(story)
    story.note("w", "watching", watch="w/1", prefix="a/", start_revision=None, resumes=None)
    finish(story, log, {})
    assert "has never shown anything" in whats(story)[0]


def test_violation_names_promise_observation_process_and_time(story: Story) -> None:
    log = Log(story)
    show(story, log.put("a/1", "v1"))
    _lost(story, log)
    (violation,) = check(story.history)
    assert str(violation) == (
        f"[watch] {violation.at:.6f} w: watch w/1 of 'a/' showed 1-4 put a/3 = v3"
        " without 1-3 put a/lost = v2 before it"
    )
    report = violation.report()
    assert "promised: a watch shows every change" in report
    assert '"watch": "w/1"' in report.splitlines()[-1]
