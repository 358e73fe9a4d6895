"""The checks of `dynamo-redis doctor` on examinations that no server here gives."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dynamo_redis.cli.doctor.checks import (
    CHECKS,
    check_cluster,
    check_connections,
    check_login,
    check_memory,
    check_notifications,
    check_tls,
    check_version,
    histogram,
)
from dynamo_redis.cli.doctor.examination import ClusterNode, Examination, Outcome
from dynamo_redis.cli.doctor.need import CONNECTIONS, connections_needed
from dynamo_redis.cli.doctor.providers import PROVIDERS, provider_of
from dynamo_redis.cli.roles import ROLES
from dynamo_redis.store.redis.certificate import TlsSession

REFUSED = Outcome(False, "NOPERM", refused=True)


def seen(url: str = "redis://10.0.0.1", **parts: Any) -> Examination:
    """An examination of a server that shows nothing but these parts."""
    given: dict[str, Any] = {
        "scripts": REFUSED,
        "script_hashes": REFUSED,
        "trips_s": [0.001],
        "rights": {role: ["get x"] for role in ROLES},
        "config_refusal": "CONFIG GET is refused",
    }
    return Examination(url, "dynamo", "10.0.0.1:6379", "default", **given | parts)


def test_server_that_shows_nothing_is_judged() -> None:
    findings = {finding.check: finding.level for finding in (check(seen()) for check in CHECKS)}
    assert len(findings) == len(CHECKS)
    assert findings["rights"] == "fail"
    assert {"version", "memory", "eviction", "persistence", "replication", "connections", "clock"} <= {
        check for check, level in findings.items() if level == "unknown"
    }


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("c.abc.ng.0001.use1.cache.amazonaws.com", "Amazon ElastiCache"),
        ("x-abc.serverless.use1.cache.amazonaws.com", "Amazon ElastiCache Serverless"),
        ("clustercfg.x.abc.memorydb.us-east-1.amazonaws.com", "Amazon MemoryDB"),
        ("x.redis.cache.windows.net", "Azure Cache for Redis"),
        ("x.westus.redis.azure.net", "Azure Managed Redis"),
        ("redis-1.c1.us-east-1-2.ec2.redns.redis-cloud.com", "Redis Cloud"),
        ("eu1-x-1.upstash.io", "Upstash"),
        ("x-y.a.AIVENCLOUD.com.", "Aiven"),
        ("10.1.2.3", None),
        ("cache.amazonaws.com.example.com", None),
    ],
)
def test_services_are_known_by_their_host(host: str, name: str | None) -> None:
    found = provider_of(host)
    assert (found and found.name) == name


def test_advice_is_that_of_the_service() -> None:
    upstash = next(provider for provider in PROVIDERS if provider.name == "Upstash")
    finding = check_notifications(seen(provider=upstash, notifies=False))
    assert finding.level == "warn"
    assert "the one setting that CONFIG SET takes there" in finding.fix


def test_versions_before_the_minimum_fail() -> None:
    assert check_version(seen(info={"redis_version": "6.0.16"})).level == "fail"
    finding = check_version(seen(info={"redis_version": "7.2.4", "valkey_version": "9.1.2"}))
    assert (finding.level, finding.text) == ("pass", "Valkey 9.1.2, like Redis 7.2.4")


def test_full_memory_fails() -> None:
    levels = [
        check_memory(seen(info={"used_memory": str(used), "maxmemory": "1000"})).level
        for used in (500, 800, 950)
    ]
    assert levels == ["pass", "warn", "fail"]


def test_need_of_connections_is_compared() -> None:
    need = {"workers": 100, "frontends": 2, "routers": 1}
    needed = connections_needed(need)
    assert needed > 100 * CONNECTIONS["workers"]
    info = {"maxclients": str(needed - 1), "connected_clients": "3"}
    assert check_connections(seen(info=info, need=need)).level == "fail"
    assert check_connections(seen(info=info | {"maxclients": str(2 * needed)}, need=need)).level == "pass"
    refused = check_connections(seen(info=info | {"rejected_connections": "7"}))
    assert (refused.level, "7 were refused" in refused.text) == ("warn", True)


def test_certificates_that_end_soon_are_named() -> None:
    session = TlsSession("TLSv1.3", "AES", time.time() + 86_400, True, True, False)
    finding = check_tls(seen("rediss://10.0.0.1", tls=session))
    assert finding.level == "warn"
    assert "the certificate ends in 23h 59m" in finding.text
    assert check_tls(seen("redis://10.0.0.1")).level == "warn"
    assert check_tls(seen("redis://127.0.0.1")).level == "pass"


def test_login_is_described_and_its_end_named() -> None:
    assert check_login(seen()).level == "warn"
    assert check_login(seen("redis://127.0.0.1")).level == "pass"
    file = "DYN_REDIS_PASSWORD_FILE (/run/secrets/redis)"
    assert check_login(seen(login=file)).text == f"user default, password from {file}"
    soon = check_login(seen(login=file, login_ends_at=time.time() + 3600))
    assert (soon.level, "ends in 59m 59s" in soon.text) == ("warn", True)
    assert check_login(seen(login=file, login_ends_at=time.time() + 7 * 86_400)).level == "pass"
    provider = "DYN_REDIS_CREDENTIALS (aws_iam_login:token)"
    assert check_login(seen(login=provider, login_ends_at=time.time() + 900)).level == "pass"
    assert check_login(seen(login=provider, login_ends_at=time.time() + 9)).level == "warn"


def test_primaries_without_a_replica_are_named() -> None:
    lines = [
        "a 10.0.0.1:6379@16379,host master - 0 0 1 connected 0-8000",
        "b 10.0.0.2:6379@16379 myself,master - 0 0 2 connected 8001-16383",
        "c 10.0.0.3:6379@16379 slave a 0 0 1 connected",
    ]
    nodes = [ClusterNode.of(line) for line in lines]
    cluster = {"cluster_state": "ok", "cluster_size": "2"}
    finding = check_cluster(seen("redis+cluster://10.0.0.1", cluster=cluster, nodes=nodes))
    assert (finding.level, finding.data["without_replica"]) == ("warn", ["10.0.0.2:6379"])


def test_bars_show_how_trips_are_spread() -> None:
    bars, ends = histogram([0.0001] * 90 + [0.01] * 10)
    assert bars == "█" + " " * 22 + "▁"
    assert ends == "0.1 ms" + "10 ms".rjust(18)
    assert histogram([0.001])[0].strip() == "█"
