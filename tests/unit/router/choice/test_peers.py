"""Which other routers hear what one says."""

from __future__ import annotations

import pytest

from dynamo_redis.router.choice.peers import Peers

DOUBT_S = 30.0


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
    return Peers(clock, DOUBT_S)


def test_a_listed_router_counts_until_it_leaves(peers: Peers, clock: HeldClock) -> None:
    assert not peers
    assert peers.listed("a")
    assert not peers.listed("a")
    clock.now += 10 * DOUBT_S
    assert peers
    peers.left("a")
    assert not peers


def test_a_router_lost_from_view_counts_for_a_while(peers: Peers, clock: HeldClock) -> None:
    peers.listed("a")
    peers.missed("a")
    clock.now += DOUBT_S - 1
    assert peers
    clock.now += 2
    assert not peers
    assert peers.listed("a"), "it is back"


def test_a_router_that_is_heard_counts_for_a_while(peers: Peers, clock: HeldClock) -> None:
    peers.missed("never seen")
    assert not peers
    peers.heard("a")
    clock.now += DOUBT_S - 1
    assert peers
    clock.now += 2
    assert not peers


def test_all_listed_routers_have_to_be_heard(peers: Peers) -> None:
    assert peers.all_heard()
    peers.listed("a")
    peers.listed("b")
    peers.heard("a")
    assert not peers.all_heard()
    peers.left("b")
    assert peers.all_heard()


def test_routers_that_left_are_not_kept(peers: Peers, clock: HeldClock) -> None:
    """Their last words come after their records have gone."""
    for number in range(100):
        peers.listed(f"r{number}")
        peers.left(f"r{number}")
        peers.heard(f"r{number}")
        clock.now += DOUBT_S + 1
    assert not peers
    assert len(peers._until) + len(peers._heard) <= 2
