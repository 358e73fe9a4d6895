"""`dynamo-redis doctor` on real servers: healthy ones, bad ones, and those that show little."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
from anyio.abc import SocketAttribute, SocketStream

from dynamo_redis.cli.doctor.checks import CHECKS, check_cluster, check_replication, check_sentinels
from dynamo_redis.cli.doctor.examination import Examination, examine
from dynamo_redis.cli.roles import ROLES, Form, Role, rules
from dynamo_redis.store.cluster_server import EmbeddedCluster
from dynamo_redis.store.sentinel_server import SentinelDeployment
from dynamo_redis.store.server import EmbeddedServer
from faults.servers import installed_servers
from tests.certificates import Authority
from tests.integration.conftest import Cli, Done

KINDS = {kind.name: kind for kind in installed_servers()}
PATH = next(iter(KINDS))
"""The server of PATH."""
PASSWORD = "s3cret-of-the-test"

Start = Callable[..., EmbeddedServer]


def in_thread(call: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: anyio.run(call)).result()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers of a kind, with settings; they end with the test."""
    running: list[EmbeddedServer] = []

    def start_one(kind: str = PATH, **settings: str | tuple[str, ...]) -> EmbeddedServer:
        directory = tmp_path / f"server-{len(running)}"
        directory.mkdir()
        given = {name.replace("_", "-"): value for name, value in settings.items()}
        server = EmbeddedServer(directory, port=0, binary=KINDS[kind].binary, settings=given)
        in_thread(server.start)
        running.append(server)
        return server

    yield start_one
    for server in running:
        in_thread(server.stop)


def found(done: Done) -> dict[str, dict[str, Any]]:
    """Return the findings by check."""
    return {finding["check"]: finding for finding in json.loads(done.out)}


def operator(server: EmbeddedServer) -> Any:
    return redis.Redis.from_url(server.url)


def levels(done: Done) -> dict[str, str]:
    return {name: finding["level"] for name, finding in found(done).items()}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_healthy_server_passes(kind: str, start: Start, cli: Cli) -> None:
    server = start(kind)
    before = operator(server).info("commandstats")
    done = cli("doctor", server.url, "--json")
    assert done.code == 0, done.out
    assert set(levels(done).values()) == {"pass"}, done.out
    assert operator(server).keys("*") == []
    assert "cmdstat_eval" not in before
    assert found(done)["rights"]["data"]["roles"] == list(ROLES)
    latency = found(done)["latency"]["data"]
    assert 0 < latency["p50_ms"] <= latency["p99_ms"] <= latency["max_ms"]
    assert abs(found(done)["clock"]["data"]["ahead_s"]) < 60
    assert done.err == ""


def test_output_has_a_line_a_check_and_a_plot(start: Start, cli: Cli) -> None:
    server = start(maxmemory_policy="volatile-lru")
    done = cli("doctor", server.url)
    assert done.code == 0, done.out
    lines = done.out.splitlines()
    names = [line.split()[1] for line in lines if line.startswith(("pass", "warn", "FAIL"))]
    assert names[0] == "connection"
    assert names[-1] == "latency"
    assert len(names) == len(set(names)) == 20
    place = next(number for number, line in enumerate(lines) if "volatile-lru" in line)
    assert lines[place].startswith("warn  eviction")
    assert lines[place + 1].strip().startswith("→ CONFIG SET maxmemory-policy noeviction")
    assert "█" in done.out
    assert lines[-1] == "19 passed, 1 warned"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_users_see_the_roles_that_they_can_have(kind: str, start: Start, cli: Cli) -> None:
    server = start(kind)
    form: Form = "6.2" if "6.2" in kind else "7.0"
    prefix = found(cli("doctor", server.url, "--json"))["registry"]["text"].split()[4]
    for role in ROLES:
        words = " ".join(rules(role, prefix, form=form)).split()
        operator(server).execute_command("ACL", "SETUSER", role, "on", f">{PASSWORD}", *words)
        done = cli("doctor", server.url.replace("//", f"//{role}:{PASSWORD}@"), "--json")
        assert done.code == 0, done.out
        expected: dict[Role, set[str]] = {
            "frontend": {"frontend", "router"},
            "worker": {"worker"},
            "router": {"router"},
            "admin": {"admin", "viewer"},
            "viewer": {"viewer"},
        }
        shown = found(done)
        assert set(shown["rights"]["data"]["roles"]) == expected[role], shown["rights"]
        assert shown["idle"]["level"] == "unknown"
        assert "cannot see" in shown["idle"]["text"]
        assert "fail" not in levels(done).values()
        assert PASSWORD not in done.out + done.err
        assert operator(server).keys("*") == [], "each trial is removed"


def test_user_without_rights_gets_the_rules_to_ask_for(start: Start, cli: Cli) -> None:
    server = start()
    operator(server).execute_command("ACL", "SETUSER", "little", "on", "nopass", "~*", "+ping", "+get")
    done = cli("doctor", server.url.replace("//", "//little:x@"), "--json")
    assert done.code == 1
    rights = found(done)["rights"]
    assert rights["level"] == "fail"
    assert "dynamo-redis acl --role viewer --user little" in rights["fix"]
    assert levels(done)["version"] == levels(done)["memory"] == levels(done)["eviction"] == "unknown"


def test_server_that_shows_little_is_tried(start: Start, cli: Cli) -> None:
    server = start()
    client = operator(server)
    hidden = ["on", "nopass", "~*", "&*", "+@all", "-config", "-info", "-acl", "-client", "-cluster"]
    client.execute_command("ACL", "SETUSER", "blind", *hidden)
    url = server.url.replace("//", "//blind:x@")
    shown = found(cli("doctor", url, "--json"))
    assert shown["notifications"]["level"] == "warn"
    assert shown["notifications"]["text"].startswith("off")
    assert shown["rights"]["data"]["roles"] == list(ROLES), "no process needs what is hidden"
    unknown = {name for name, finding in shown.items() if finding["level"] == "unknown"}
    assert {"version", "memory", "persistence", "replication", "connections", "buffers"} <= unknown
    client.config_set("notify-keyspace-events", "Kxe")
    shown = found(cli("doctor", url, "--json"))
    assert (shown["notifications"]["level"], shown["notifications"]["text"]) == ("pass", "on (tried)")


def test_bad_settings_are_named_with_their_remedy(start: Start, cli: Cli) -> None:
    server = start(
        maxmemory_policy="allkeys-lru", appendonly="no", timeout="5", notify_keyspace_events="KEA",
        client_output_buffer_limit=("normal", "1mb", "0", "0"), maxclients="100",
    )  # fmt: skip
    done = cli("doctor", server.url, "--json", "--workers", "50", "--frontends", "2", "--routers", "1")
    assert done.code == 1
    shown = found(done)
    assert {name for name, finding in shown.items() if finding["level"] == "fail"} == {
        "eviction",
        "connections",
    }
    assert {name for name, finding in shown.items() if finding["level"] == "warn"} == {
        "persistence",
        "idle",
        "buffers",
    }
    assert "50 workers, 2 frontends, 1 router need about" in shown["connections"]["text"]
    assert "maxclients" in shown["connections"]["fix"]
    assert shown["notifications"]["text"] == "on (AKE)"


def test_server_that_refuses_writes_fails(start: Start, cli: Cli) -> None:
    server = start(min_replicas_to_write="1")
    done = cli("doctor", server.url, "--json")
    assert done.code == 1
    shown = found(done)
    assert shown["scripts"]["level"] == "fail"
    assert "too few replicas" in shown["scripts"]["text"]
    assert shown["replication"]["level"] == "fail"


def test_replica_and_its_primary_are_told_apart(start: Start, cli: Cli) -> None:
    primary = start()
    replica = start()
    port = primary.url.rpartition(":")[2]
    operator(replica).execute_command("REPLICAOF", "127.0.0.1", port)
    deadline = time.monotonic() + 30
    while operator(replica).info("replication")["master_link_status"] != "up":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    shown = found(cli("doctor", replica.url, "--json"))
    assert shown["replication"]["text"] == f"a read-only replica of 127.0.0.1:{port}"
    shown = found(cli("doctor", primary.url, "--json"))
    assert shown["replication"]["level"] == "warn"
    assert "min-replicas-to-write 0" in shown["replication"]["text"]


def test_other_schema_fails(start: Start, cli: Cli, dynamo_redis_prefix: str) -> None:
    server = start()
    operator(server).hset(f"{{{dynamo_redis_prefix}}}:meta", "schema", "2")
    done = cli("doctor", server.url, "--json")
    assert done.code == 1
    assert "schema version 2, this release reads 1" in found(done)["registry"]["text"]


def test_unreachable_server_ends_with_two(start: Start, cli: Cli) -> None:
    server = start(requirepass=PASSWORD)
    refused = cli("doctor", server.url.replace("//", "//:wrong-password@"), "--json")
    assert refused.code == 2
    assert "refuses the user name or password" in found(refused)["connection"]["text"]
    assert "wrong-password" not in refused.out + refused.err
    assert cli("doctor", server.url).code == 2
    assert cli("doctor", server.url, "--redis-url", server.url).err.startswith(
        "dynamo-redis: give either URL"
    )
    in_thread(server.stop)
    gone = cli("doctor", server.url)
    assert gone.code == 2
    assert gone.out.startswith("FAIL  connection")


def test_tls_is_described(start: Start, cli: Cli, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    identity = authority.issue("127.0.0.1")
    server = start(
        tls_cert_file=str(identity.cert),
        tls_key_file=str(identity.key),
        tls_ca_cert_file=str(authority.path),
        tls_auth_clients="no",
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    operator(server).config_set("tls-port", port)
    url = f"rediss://127.0.0.1:{port}"
    shown = found(cli("doctor", f"{url}?ssl_ca_certs={authority.path}", "--json"))
    assert shown["tls"]["level"] == "pass"
    assert shown["tls"]["text"].startswith("TLSv1.")
    assert "verified; the certificate ends in 36" in shown["tls"]["text"]
    shown = found(cli("doctor", f"{url}?ssl_cert_reqs=none&ssl_check_hostname=false", "--json"))
    assert shown["tls"]["level"] == "warn"
    assert cli("doctor", url).code == 2, "its CA is not known"


@pytest.mark.parametrize("setting", ["DYN_REDIS_PASSWORD_FILE", "DYN_REDIS_CREDENTIALS", "DYN_REDIS_URL"])
def test_login_is_named_without_its_password(
    setting: str, start: Start, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(requirepass="Hunter2pass")
    file = tmp_path / "password"
    file.write_text("Hunter2pass")
    (tmp_path / "doctor_tokens.py").write_text(
        "import time\ndef token():\n    return 'default', 'Hunter2pass', time.time() + 20\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    url = server.url
    if setting == "DYN_REDIS_URL":
        url = url.replace("//", "//:Hunter2pass@")
    else:
        monkeypatch.setenv(setting, str(file) if setting.endswith("FILE") else "doctor_tokens:token")
    done = cli("doctor", url, "--json")
    shown = found(done)["login"]
    assert shown["text"].startswith(f"user default, password from {setting}")
    assert shown["level"] == ("warn" if setting == "DYN_REDIS_CREDENTIALS" else "pass")
    assert ("token that ends in" in shown["text"]) == (setting == "DYN_REDIS_CREDENTIALS")
    assert "Hunter2pass" not in done.out + done.err


async def test_proxy_that_cuts_connections_is_examined(own_redis_server: EmbeddedServer) -> None:
    """Some proxies close a connection upon a command that they do not know."""
    host, port = "127.0.0.1", own_redis_server.url.rpartition(":")[2]

    async def serve(client: SocketStream) -> None:
        async def pass_on(source: SocketStream, sink: SocketStream) -> None:
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                while not re.search(b"CONFIG|ACL|XACK", data := await source.receive()):
                    await sink.send(data)
            group.cancel_scope.cancel()

        async with (
            client,
            await anyio.connect_tcp(host, int(port)) as server,
            anyio.create_task_group() as group,
        ):
            group.start_soon(pass_on, client, server)
            group.start_soon(pass_on, server, client)

    async with (
        await anyio.create_tcp_listener(local_host=host) as listener,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, serve)
        url = f"redis://{host}:{listener.extra(SocketAttribute.local_port)}"
        seen = await examine(url, "doctor", timeout_s=10.0, need={})
        levels = {finding.check: finding.level for finding in (check(seen) for check in CHECKS)}
        tasks.cancel_scope.cancel()
    assert {check for check, level in levels.items() if level == "unknown"} == {"buffers", "idle"}
    assert levels["streams"] == levels["scripts"] == levels["rights"] == "pass"
    assert [name.partition(" ")[0] for name in seen.rights["router"]] == ["xack", "xack"]
    assert seen.rights["viewer"] == []


async def test_cluster_is_examined_by_its_url(tmp_path: Path) -> None:
    async with EmbeddedCluster(tmp_path) as cluster:

        async def look() -> Examination:
            return await examine(cluster.url, "doctor", timeout_s=10.0, need={})

        seen = await look()
        found = {finding.check: finding for finding in (check(seen) for check in CHECKS)}
        assert {name for name, finding in found.items() if finding.level != "pass"} <= {"replication"}, found
        assert found["cluster"].text == "a cluster of 3 primaries, each with a replica"
        assert found["rights"].data["roles"] == list(ROLES)
        lost = next(node for node in cluster.running() if node.master is not None)
        assert lost.master is not None
        await lost.server.kill()
        with anyio.fail_after(60):
            while (finding := check_cluster(await look())).level == "pass":
                await anyio.sleep(0.1)
        assert f"127.0.0.1:{lost.port} cannot be reached" in finding.text
        alone = await examine(f"redis://127.0.0.1:{lost.master.port}", "doctor", timeout_s=10.0, need={})
        assert check_cluster(alone).level == "fail"
        assert "redis+cluster://" in check_cluster(alone).fix


async def test_sentinels_of_the_url_are_asked(tmp_path: Path) -> None:
    async def judged() -> tuple[str, str]:
        seen = await examine(deployment.url, "doctor", timeout_s=5.0, need={})
        assert check_replication(seen).data["replicas"] == 2
        finding = check_sentinels(seen)
        return finding.level, finding.text

    async with SentinelDeployment(tmp_path / "servers") as deployment:
        assert await judged() == ("pass", "3 of 3 answer, and can agree on a failover")
        first, second, _ = deployment.sentinels
        await first.kill()
        assert await judged() == ("warn", f"2 of 3 answer, without 127.0.0.1:{first.port}")
        await second.kill()
        with anyio.fail_after(60):  # until the third one has noticed
            while (await judged())[0] != "fail":
                await anyio.sleep(0.05)
