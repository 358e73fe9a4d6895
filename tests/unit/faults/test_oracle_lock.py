"""The oracle of locks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from faults.oracles.lock import check
from faults.story import Story


def whats(story: Story) -> list[str]:
    return [violation.what for violation in check(story.history)]


def acquire(story: Story, process: str, token: int) -> None:
    story.call(process, "lock_acquire", {"token": token}, lock="l")


def write(story: Story, process: str, token: int, value: str, *, refused: bool = False) -> None:
    story.call(process, "lock_write", {}, refused=refused, lock="l", token=token, value=value)


def read(story: Story, value: str | None, token: int | None) -> None:
    story.call("r", "lock_read", {"value": value, "token": token}, lock="l")


@pytest.fixture
def story() -> Story:
    return Story()


# ---------------------------------------------------------------------- right


def test_successive_holders_are_right(story: Story) -> None:
    read(story, None, None)
    acquire(story, "a", 5)
    write(story, "a", 5, "a1")
    acquire(story, "b", 7)
    write(story, "a", 5, "a2", refused=True)
    read(story, "a1", 5)
    write(story, "b", 7, "b1")
    read(story, "b1", 7)
    assert whats(story) == []


def test_write_that_overlaps_the_next_grant_may_be_accepted(story: Story) -> None:
    acquire(story, "a", 5)
    slow = story.begin("a", "lock_write", lock="l", token=5, value="a1")
    acquire(story, "b", 7)
    slow.ok({})
    assert whats(story) == []


def test_write_of_unknown_outcome_may_show_late(story: Story) -> None:
    acquire(story, "a", 5)
    story.begin("a", "lock_write", lock="l", token=5, value="a1")
    read(story, None, None)
    read(story, "a1", 5)
    assert whats(story) == []


def test_failover_may_forget_a_grant(story: Story) -> None:
    acquire(story, "a", 5)
    acquire(story, "b", 7)
    write(story, "b", 7, "b1")
    story.note("runner", "fault", name="failover")
    story.note("runner", "loses", what="tail")
    story.note("runner", "healed", name="failover")
    write(story, "a", 5, "a1")
    read(story, "a1", 5)
    assert whats(story) == []


# ---------------------------------------------------------------------- wrong


def _stale_write(story: Story) -> None:
    acquire(story, "a", 5)
    acquire(story, "b", 7)
    write(story, "a", 5, "a1")


def _tokens_go_back(story: Story) -> None:
    acquire(story, "a", 5)
    acquire(story, "b", 7)
    write(story, "b", 7, "b1")
    write(story, "a", 5, "a1")


def _one_token_for_two(story: Story) -> None:
    acquire(story, "a", 5)
    acquire(story, "b", 5)


def _token_of_no_grant(story: Story) -> None:
    write(story, "a", 5, "a1")


def _refused_write_shows(story: Story) -> None:
    acquire(story, "a", 5)
    acquire(story, "b", 7)
    write(story, "a", 5, "a1", refused=True)
    read(story, "a1", 5)


def _accepted_write_is_lost(story: Story) -> None:
    acquire(story, "a", 5)
    write(story, "a", 5, "a1")
    write(story, "a", 5, "a2")
    read(story, "a1", 5)


def _value_of_no_write(story: Story) -> None:
    read(story, "x", 5)


def _anothers_token(story: Story) -> None:
    acquire(story, "a", 5)
    write(story, "a", 5, "a1")
    read(story, "a1", 7)


WRONG: dict[Callable[[Story], None], str] = {
    _stale_write: "a wrote as holder after b had been granted it",
    _tokens_go_back: "a write was accepted with token 7, then one with 5",
    _one_token_for_two: "token 5 was granted to a and to b",
    _token_of_no_grant: "a token that was never granted",
    _refused_write_shows: "showed a1, which was refused",
    _accepted_write_is_lost: "showed a1, which a2 had replaced",
    _value_of_no_write: "showed x, which was never written",
    _anothers_token: "with token 7, which is another's",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__.strip("_"))
def test_each_violation_is_found(story: Story, wrong: Callable[[Story], None]) -> None:
    wrong(story)
    said = whats(story)
    assert any(WRONG[wrong] in what for what in said), said
