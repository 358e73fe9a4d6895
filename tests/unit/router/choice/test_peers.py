"""Which other routers hear what one says."""

from __future__ import annotations

import pytest

from dynamo_redis.router.choice.peers import Peers

GRACE_S = 30.0


class HeldClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


@pytest.fixture
def clock() -> HeldClock:
    return HeldClock()


@pytest.fixture
def peers(clock: HeldClock) -> Peers:
    return Peers(clock, GRACE_S)


def test_a_listed_router_counts_until_it_leaves(peers: Peers, clock: HeldClock) -> None:
    assert not peers
    assert peers.note_listed("a")
    assert not peers.note_listed("a")
    clock.now += 10 * GRACE_S
    assert peers
    peers.remove("a")
    assert not peers


def test_a_router_lost_from_view_counts_for_a_while(peers: Peers, clock: HeldClock) -> None:
    peers.note_listed("a")
    peers.note_vanished("a")
    clock.now += GRACE_S - 1
    assert peers
    clock.now += 2
    assert not peers
    assert peers.note_listed("a"), "it is back"


def test_a_router_that_is_heard_counts_for_a_while(peers: Peers, clock: HeldClock) -> None:
    peers.note_vanished("never seen")
    assert not peers
    peers.note_heard("a")
    clock.now += GRACE_S - 1
    assert peers
    clock.now += 2
    assert not peers


def test_all_listed_routers_have_to_be_heard(peers: Peers) -> None:
    assert peers.all_heard()
    peers.note_listed("a")
    peers.note_listed("b")
    peers.note_heard("a")
    assert not peers.all_heard()
    peers.remove("b")
    assert peers.all_heard()


def test_routers_that_left_are_not_kept(peers: Peers, clock: HeldClock) -> None:
    """Their last words come after their records have gone."""
    for number in range(100):
        peers.note_listed(f"r{number}")
        peers.remove(f"r{number}")
        peers.note_heard(f"r{number}")
        clock.now += GRACE_S + 1
    assert not peers
    assert len(peers._until) + len(peers._heard) <= 2
