"""The registry's small parts, without a server."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace

import pytest
from redis import exceptions as redis_errors

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable
from dynamo_redis.store.base import LeaseId, Revision, Snapshot
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.health import Health
from dynamo_redis.store.redis.server_errors import store_error
from dynamo_redis.store.registry.change_log import Change, Position
from dynamo_redis.store.registry.lease import WriterChain
from dynamo_redis.store.registry.watch import BUFFER_CHANGES_COUNT, PrefixView
from dynamo_redis.store.scripts import load_script

# --------------------------------------------------------------------------- client


def test_backoff_doubles_under_full_jitter_up_to_its_cap() -> None:
    backoff = Backoff(0.05, 2.0, rng=random.Random(1))
    waits = [backoff.next_s() for _ in range(2000)]
    assert all(0 <= wait <= min(2.0, 0.05 * 2**n) for n, wait in enumerate(waits[:10]))
    assert max(waits) <= 2.0
    assert 0.9 < sum(waits[10:]) / len(waits[10:]) < 1.1
    backoff.reset()
    assert backoff.next_s() <= 0.05


@pytest.mark.parametrize(
    ("exc", "kind", "says"),
    [
        (redis_errors.TimeoutError("Timeout reading"), StoreUnavailable, "in time"),
        (TimeoutError(), StoreUnavailable, "in time"),
        (redis_errors.ConnectionError("Error 111"), StoreUnavailable, "no connection"),
        (ConnectionResetError("reset"), StoreUnavailable, "no connection"),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed"), StoreUnavailable, "is it running"),
    ],
)
def test_failed_exchange_gets_its_meaning(exc: Exception, kind: type[StoreError], says: str) -> None:
    error = store_error(exc, "redis.example:6379")
    assert type(error) is kind
    assert says in str(error)
    assert "redis.example:6379" in str(error)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://", "localhost:6379"),
        ("redis://user:secret@redis.example", "redis.example:6379"),
        ("rediss://redis.example:7000/0", "redis.example:7000"),
        ("redis://:secret@[::1]:6380", "[::1]:6380"),
        ("unix:///run/redis.sock", "/run/redis.sock"),
    ],
)
async def test_a_client_shows_where_it_connects_and_no_secret(url: str, address: str) -> None:
    client = RedisClient(url, timeout_s=1.0)
    assert client.address == address
    assert "secret" not in repr(client)
    await client.aclose()


async def test_a_closed_client_stays_closed() -> None:
    client = RedisClient("redis://127.0.0.1:1", timeout_s=1.0)
    await client.aclose()
    await client.aclose()
    for call in (
        client.execute("PING"),
        client.script(load_script("registry_tick"), []),
        client.pipeline([]),
    ):
        with pytest.raises(StoreUnavailable, match="has been closed"):
            await call


# --------------------------------------------------------------------------- keys and scripts


def test_all_keys_share_the_tag() -> None:
    keys = RegistryKeys("dep[1]*")
    for key in (*keys.structures, keys.lease(LeaseId(7))):
        assert key.startswith("{dep[1]*}:")
    assert keys.lease_channel == "__keyspace@0__:{dep\\[1\\]\\*}:lease:*"


def test_script_is_its_prelude_and_file_without_comments() -> None:
    script = load_script("registry_tick", "registry_prelude")
    assert "local function open(" in script.source
    assert "IDLE_MS, FULL}" in script.source
    assert not any(line.lstrip().startswith("--") for line in script.source.splitlines())
    assert len(script.sha) == 40
    assert script is load_script("registry_tick", "registry_prelude")


# --------------------------------------------------------------------------- writer chain


def test_the_chain_agrees_with_the_last_acknowledged_write() -> None:
    chain = WriterChain()
    assert chain.agrees("")
    chain.begin("a")
    chain.acknowledged("a", Revision("1-0"))
    assert chain.agrees("1-0 a")
    assert not chain.agrees("")
    assert not chain.agrees("1-0 b")
    chain.begin("b")
    chain.acknowledged("b", None)  # it changed nothing
    assert chain.agrees("1-0 a")


def test_a_doubtful_write_may_or_may_not_have_arrived() -> None:
    chain = WriterChain()
    chain.begin("a")
    chain.acknowledged("a", Revision("1-0"))
    chain.begin("b")
    chain.in_doubt("b")
    assert chain.agrees("1-0 a ")
    assert chain.agrees("2-0 b a")
    assert not chain.agrees("2-0 b "), "the lease had ended, and b was what it was granted with"
    chain.settle("2-0 b a")
    assert not chain.agrees("1-0 a ")


def test_write_names_the_write_before_it() -> None:
    chain = WriterChain()
    chain.begin("a")
    assert chain.acknowledged("a", Revision("1-0"), "")
    chain.begin("b")
    assert chain.acknowledged("b", Revision("2-0"), "a")
    chain.begin("c")
    assert not chain.acknowledged("c", Revision("3-0"), "a"), "b was lost"
    assert not chain.agrees("3-0 c a"), "until it is settled"
    chain.settle("3-0 c a")
    assert chain.agrees("3-0 c a")
    assert chain.acknowledged("d", Revision("4-0"), None)


def test_chain_expects_its_writes_and_remembers_a_bounded_number() -> None:
    chain = WriterChain()
    chain.begin("a")
    assert chain.expects("a")
    chain.acknowledged("a", Revision("1-0"))
    assert chain.expects("a")
    for number in range(5000):
        chain.begin(str(number))
        chain.in_doubt(str(number))
    assert not chain.expects("4999")
    assert chain.agrees("2-0 4999 a")
    assert not chain.agrees("2-0 1 a")
    assert len(chain._doubtful) <= 1000


def test_acknowledgements_may_arrive_out_of_order() -> None:
    chain = WriterChain()
    chain.begin("a")
    chain.begin("b")
    chain.acknowledged("b", Revision("10-0"))
    chain.acknowledged("a", Revision("9-0"))
    assert chain.agrees("10-0 b")


def test_nothing_diverges_while_writes_are_under_way() -> None:
    chain = WriterChain()
    quiet = chain.observe()
    assert chain.diverged(quiet, "1-0 stranger")
    chain.begin("a")
    assert chain.observe() is None
    assert not chain.diverged(quiet, "1-0 a")
    assert not chain.diverged(None, "1-0 a")
    chain.acknowledged("a", Revision("1-0"))
    assert not chain.diverged(quiet, ""), "a write went between"
    assert chain.diverged(chain.observe(), "")


# --------------------------------------------------------------------------- views


def change(number: int, key: str = "a/1") -> Change:
    return Change(Revision(f"{number}-0"), "d", key, None, "op", (Revision(f"{number - 1}-0"), "op"))


async def test_view_overrun_while_loading_must_be_loaded_again() -> None:
    view = PrefixView("a/")
    snapshot, position = Snapshot((), Revision("5-0")), Position("i", Revision("5-0"), "op")
    view.begin_load()
    for number in range(BUFFER_CHANGES_COUNT + 1):
        view.keep([change(number + 1)])
    assert not view.finish_load(snapshot, position)
    view.begin_load()
    view.keep([change(4), change(6)])
    assert view.finish_load(snapshot, position)
    assert view.position == Position("i", Revision("6-0"), "op")


# --------------------------------------------------------------------------- health


def test_refusal_is_distinct_from_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    health = Health("redis.example:6379")
    refusal = StoreRefused("Redis at redis.example:6379 takes no writes")
    refusal.answered, refusal.answer_code = True, "OOM"
    health.refused("tick", refusal)  # it does not answer reads either
    reasons = [health.write_refusal]
    health.succeeded()
    health.refused("tick", StoreUnavailable("the connection broke"))
    reasons.append(health.write_refusal)
    for _ in range(3):
        health.refused("tick", refusal)
    assert health.connected
    reasons.append(health.write_refusal)
    health.wrote("tick", full=True)
    reasons.append(health.write_refusal)
    health.wrote("tick")
    reasons.append(health.write_refusal)
    full = "Redis at redis.example:6379 is out of memory: raise its maxmemory"
    assert reasons == [None, None, str(refusal), full, None]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_an_outage_is_two_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    health = Health("redis.example:6379")
    states = [health.connected]
    health.succeeded()
    states.append(health.connected)
    for _ in range(100):
        health.failed(StoreUnavailable("no connection to Redis at redis.example:6379: refused"))
    states.append(health.connected)
    health.succeeded()
    health.succeeded()
    assert states == [False, True, False]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    for _ in range(10):  # flapping
        health.failed(StoreUnavailable("again"))
        health.succeeded()
    assert len(caplog.records) == 2


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of `health`, for a test to set."""
    times = [1000.0]
    monkeypatch.setattr("dynamo_redis.store.redis.health.time", SimpleNamespace(monotonic=lambda: times[0]))
    return times


def test_second_outage_that_lasts_is_logged(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    health = Health("redis.example:6379")
    health.failed(StoreUnavailable("first"))
    health.succeeded()
    for now[0] in (1002.0, 1004.0, 1006.0, 1008.0):
        health.failed(StoreUnavailable("second"))
    health.succeeded()
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "first; going on from the last view, trying again",
        "Redis at redis.example:6379 is back after 0.0 s",
        "second; going on from the last view, trying again",
        "Redis at redis.example:6379 is back after 6.0 s",
    ]


def test_a_second_refusal_that_lasts_is_told(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    health = Health("redis.example:6379")
    health.succeeded()
    for begin in (0.0, 3.0, 6.0):
        now[0] = 1000.0 + begin
        health.wrote("tick", full=True)
        health.wrote("tick")
    assert len(caplog.records) == 2
    for now[0] in (1010.0, 1029.0, 1031.0, 1033.0):
        health.wrote("tick", full=True)
    assert len(caplog.records) == 3
    health.wrote("tick")
    assert caplog.records[-1].getMessage() == "Redis at redis.example:6379 takes writes again, after 23.0 s"


def test_change_of_reason_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    health = Health("redis.example:6379")
    health.succeeded()
    for code in ("NOREPLICAS", "READONLY", "NOREPLICAS", "READONLY"):
        refusal = StoreUnavailable(code)
        refusal.answered, refusal.answer_code = True, code
        health.refused("tick", refusal)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ["NOREPLICAS", "READONLY"]
