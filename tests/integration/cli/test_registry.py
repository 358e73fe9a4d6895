"""The commands for the registry and the object store, against a real server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
import redis

from dynamo_redis.frontend.record import FrontendRecord
from dynamo_redis.models.card import FileReference, ModelCard
from dynamo_redis.names import EndpointName, InstanceId, frontend_key, kv_router_key
from dynamo_redis.router.answering import state_endpoint
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.keys import ObjectKeys
from dynamo_redis.store.server import EmbeddedServer
from tests.integration.conftest import Cli, Done
from tests.rubbish import WORST_JSON

ENDPOINT = EndpointName("dynamo", "backend", "generate")


# --------------------------------------------------------------------------- keys


def test_a_key_is_written_read_and_deleted(cli: Cli) -> None:
    first = cli("put", "app/motd", '{"text": "hé", "n": [1, 2]}')
    assert first.code == 0
    second = cli("put", "app/motd", '{"text": "hé", "n": [1, 2]}', "--json")
    assert second.json[0]["key"] == "app/motd"
    assert cli("get", "app/motd").out == '{\n  "text": "hé",\n  "n": [\n    1,\n    2\n  ]\n}\n'
    assert cli("get", "app/motd", "--raw").out == '{"text": "hé", "n": [1, 2]}'
    (record,) = cli("get", "app/motd", "--json").json
    assert record == {
        "key": "app/motd",
        "value": {"text": "hé", "n": [1, 2]},
        "encoding": "json",
        "size_bytes": 28,
        "create_revision": first.out.strip(),
        "mod_revision": second.json[0]["mod_revision"],
        "version": 2,
        "lease": None,
    }
    assert cli("del", "app/motd") == Done(0, "", "")
    assert cli("get", "app/motd") == Done(1, "", "dynamo-redis: no such key: app/motd\n")
    assert cli("del", "app/motd") == Done(1, "", "dynamo-redis: no such key: app/motd\n")


def test_bytes_go_in_and_out_unchanged(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = bytes(range(256))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(blob)))
    assert cli("put", "app/blob", "-").code == 0
    assert cli("get", "app/blob", "--raw").out.encode(errors="surrogateescape") == blob
    assert cli("get", "app/blob").out.startswith("base64:AAECAwQ")
    (record,) = cli("get", "app/blob", "--json").json
    assert (record["encoding"], record["size_bytes"]) == ("base64", 256)


def test_a_prefix_is_a_table_for_people_and_a_list_for_programs(cli: Cli) -> None:
    for name in ("b", "a", "c\x1b[2J"):
        assert cli("put", f"app/{name}", f"value of {name}").code == 0
    assert cli("put", "other", "x").code == 0
    lines = cli("get", "--prefix", "app/").out.splitlines()
    assert lines[0].split() == ["KEY", "SIZE", "WRITES", "LEASE", "VALUE"]
    assert [line.split()[0] for line in lines[2:]] == ["app/a", "app/b", "app/c\\x1b[2J"]
    assert [record["key"] for record in cli("get", "--prefix", "app/", "--json").json] == [
        "app/a",
        "app/b",
        "app/c\x1b[2J",
    ]
    assert cli("get", "--prefix", "nothing/", "--json").json == []
    nothing = cli("get", "--prefix", "nothing/")
    assert (nothing.code, nothing.out, nothing.err) == (0, "", "no keys under 'nothing/'\n")


# --------------------------------------------------------------------------- instances and models


def put_instance(cli: Cli, instance_id: int, **changes: object) -> str:
    address = f"10.0.0.7:37145/{ENDPOINT.subject(instance_id)}"
    instance = Instance(
        ENDPOINT, InstanceId(instance_id), {"tcp": address}, secret=b"\xc0\xff\xee", started_at=1.0
    )
    key = ENDPOINT.instance_key(instance_id)
    record = {**json.loads(instance.to_bytes()), **changes}
    assert cli("put", key, json.dumps(record)).code == 0
    return key


def test_instances_are_listed(cli: Cli) -> None:
    key = put_instance(cli, 0x694D98147D54BFDE)
    put_instance(cli, 0x2A, ready=False)
    head, _, *lines = cli("instances").out.splitlines()
    assert head.split() == ["INSTANCE", "SERVES", "ADDRESS", "STATE", "UP"]
    assert lines[0].split()[:5] == ["2a", "dynamo.backend.generate", "tcp", "10.0.0.7:37145", "stalled"]
    assert lines[1].split()[:5] == [
        "694d98147d54bfde",
        "dynamo.backend.generate",
        "tcp",
        "10.0.0.7:37145",
        "ready",
    ]
    found = cli("instances", "--json").json
    assert [instance["instance_id"] for instance in found] == [0x2A, 7587888160958627806]
    assert found[1]["key"] == key
    assert cli("instances", "dynamo.backend.generate", "--json").json == found
    assert cli("instances", "dynamo.backend", "--json").json == found
    assert cli("instances", "dynamo.backend.other", "--json").json == []
    assert cli("instances", "dynamo.back").err == "no instances of dynamo.back\n"
    assert "whole parts" in cli("instances", "--help").out


def test_a_process_is_one_row(cli: Cli) -> None:
    put_instance(cli, 0x2A)
    other = state_endpoint(ENDPOINT)
    instance = Instance(other, InstanceId(0x2A), {"tcp": "10.0.0.7:37145/2a/x"})
    assert cli("put", other.instance_key(0x2A), instance.to_bytes().decode()).code == 0
    for instance_id, mode in ((0x2A, "kv"), (0x2B, "round_robin")):
        frontend = FrontendRecord(
            instance_id=instance_id, http_url=f"http://host-{mode}:8000", router_mode=mode
        )
        assert cli("put", frontend_key(InstanceId(instance_id)), frontend.to_bytes().decode()).code == 0
    _, _, one, two = cli("instances").out.splitlines()
    assert one.split("  ")[0] == "2a"
    serves = f"OpenAI API (kv) + {ENDPOINT} + {other} "
    for shown in (serves, "http://host-kv:8000", "tcp 10.0.0.7:37145"):
        assert one.count(shown) == 1
    assert "OpenAI API (round_robin)" in two
    assert "http://host-round_robin:8000" in two
    assert len(cli("instances", "--json").json) == 4
    assert "OpenAI" not in cli("instances", "dynamo.backend").out
    assert cli("put", "v1/frontends/2c", "{}").code == 0
    broken = cli("instances")
    assert (broken.code, broken.out.count("unreadable: v1/frontends/2c is not a frontend's record")) == (1, 1)


def test_a_place_where_nothing_can_be_written_is_named(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    assert cli("objects", "put", "a/b", str(source)).code == 0
    gone = cli("objects", "get", "a/b", str(tmp_path / "none" / "x"))
    assert (gone.code, gone.err) == (1, f"dynamo-redis: {tmp_path / 'none'}: there is no such directory\n")
    (tmp_path / "taken").mkdir()
    taken = cli("objects", "get", "a/b", str(tmp_path / "taken"))
    assert (taken.code, taken.err) == (
        1,
        f"dynamo-redis: {tmp_path / 'taken'} cannot be written: Is a directory\n",
    )


def test_secrets_are_shown_only_when_asked_for(cli: Cli) -> None:
    key = put_instance(cli, 42)
    for arguments in (["instances"], ["get", key], ["get", "--prefix", "v1/"]):
        for form in ([], ["--json"]):
            assert "c0ffee" not in cli(*arguments, *form).out, (arguments, form)
            assert "c0ffee" in cli(*arguments, *form, "--show-secrets").out, (arguments, form)


def test_a_record_that_cannot_be_read_does_not_hide_the_others(cli: Cli) -> None:
    put_instance(cli, 1)
    put_instance(cli, 2, version=99)
    assert cli("put", ENDPOINT.instance_key(3), "nonsense").code == 0
    assert cli("put", ENDPOINT.instance_key(4), '{"secret": "c0ffee", "version": 1e999}').code == 0
    shown = cli("instances")
    lines = shown.out.splitlines()[2:]
    assert "ready" in lines[0]
    assert [line.split()[-1] for line in lines[1:4]] == ["unreadable"] * 3
    assert f"unreadable: an instance record at {ENDPOINT.instance_key(2)} has schema version 99" in lines[4]
    assert f"unreadable: {ENDPOINT.instance_key(3)} is not an instance record" in lines[5]
    assert (shown.code, shown.err) == (1, "dynamo-redis: 3 instance records cannot be read: see above\n")
    found = json.loads(cli("instances", "--json").out)
    assert [("error" in instance) for instance in found] == [False, True, True, True]
    assert "c0ffee" not in json.dumps(found), "nor in what is no JSON"
    for key in (3, 4):
        assert cli("del", ENDPOINT.instance_key(key)).code == 0
    assert cli("instances").code == 1
    assert cli("del", ENDPOINT.instance_key(2)).code == 0
    assert cli("instances").code == 0


@pytest.mark.parametrize("name", WORST_JSON)
def test_worst_values_are_shown_by_every_listing(cli: Cli, name: str, tmp_path: Path) -> None:
    value = WORST_JSON[name].decode(errors="surrogateescape")
    put_instance(cli, 1)
    router = state_endpoint(ENDPOINT)
    for key in (
        ENDPOINT.instance_key(2),
        ENDPOINT.model_card_key(2),
        "v1/mdc/no/key",
        router.instance_key(3),
    ):
        assert cli("put", key, value).code == 0
    assert cli("get", "--prefix", "v1/").out.count("v1/") >= 5
    assert len(cli("get", "--prefix", "v1/", "--json").json) == 5
    instances, models = cli("instances"), cli("models")
    assert (instances.code, models.code) == (1, 1)
    assert "ready" in instances.out
    assert instances.out.count("unreadable: ") == 2
    assert models.out.count("unreadable: ") == 2
    assert cli("models", "--json").out.count('"error": ') == 2
    for key in (kv_router_key("dynamo", "backend", "zz"), "v1/kv_routers/dynamo/backend/ab-cd"):
        assert cli("put", key, value).code == 0
    states = cli("router-state")
    assert states.out.count("unreadable: ") == 3
    assert (states.code, states.err) == (1, "dynamo-redis: 3 routers cannot be read: see above\n")
    assert f"unreadable: {'an instance record at ' * (name == 'a later major version')}v1/" in states.out


def test_models_are_listed_with_their_workers(cli: Cli) -> None:
    files = {
        "tokenizer.json": FileReference(url="redis-object://models/t", sha256="0" * 64, size_bytes=11 << 20)
    }
    card = ModelCard(
        display_name="Qwen/Qwen3", slug="q", context_length=40960, kv_cache_block_size=16, files=files
    )
    for instance_id in (1, 2):
        assert cli("put", ENDPOINT.model_card_key(instance_id), card.to_bytes().decode()).code == 0
    assert cli("put", ENDPOINT.model_card_key(3), "{}").code == 0
    shown = cli("models")
    lines = shown.out.splitlines()[2:]
    assert lines[0].split() == [
        "Qwen/Qwen3", "chat+completions", "dynamo.backend.generate", "2", "40960", "16", "11", "MiB",
        card.fingerprint[:8],
    ]  # fmt: skip
    assert lines[1].strip() == "unreadable"
    assert lines[2].startswith(f"unreadable: {ENDPOINT.model_card_key(3)} is not a model card")
    assert (shown.code, shown.err) == (1, "dynamo-redis: 1 model card cannot be read: see above\n")
    found = json.loads(cli("models", "--json").out)
    assert list(found[1]) == ["key", "error"]
    assert (found[0]["model"], found[0]["instance_ids"]) == ("Qwen/Qwen3", [1, 2])


def test_models_show_workers_whose_cards_differ(cli: Cli) -> None:
    for instance_id, length in ((1, 4096), (2, 1000), (3, 1000)):
        card = ModelCard(display_name="m", slug="m", context_length=length, kv_cache_block_size=16)
        assert cli("put", ENDPOINT.model_card_key(instance_id), card.to_bytes().decode()).code == 0
    shown = cli("models")
    rows = [line.split() for line in shown.out.splitlines()[2:]]
    assert sorted((row[3], row[4]) for row in rows) == [("1", "4096"), ("2", "1000")]
    assert len({row[-1] for row in rows}) == 2
    assert shown.err.startswith(
        "model m has workers in 2 groups that differ in endpoint or card: frontends share its requests "
    )
    assert shown.code == 0
    found = json.loads(cli("models", "--json").out)
    assert sorted(entry["instance_ids"] for entry in found) == [[1], [2, 3]]


# --------------------------------------------------------------------------- watch


def test_a_watch_prints_the_state_and_then_each_change(cli: Cli) -> None:
    assert cli("put", "app/a", "1").code == 0
    put_instance(cli, 42)
    with subprocess.Popen(
        [sys.executable, "-m", "dynamo_redis", "watch", "", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            lines = [json.loads(process.stdout.readline()) for _ in range(2)]
            assert cli("put", "app/a", "2").code == 0
            assert cli("del", "app/a").code == 0
            lines += [json.loads(process.stdout.readline()) for _ in range(2)]
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 130
            assert process.stderr.read().strip() == "", "click ends the line of the ^C"
        finally:
            process.kill()
    assert [(line["event"], line["key"]) for line in lines] == [
        ("put", "app/a"),
        ("put", ENDPOINT.instance_key(42)),
        ("put", "app/a"),
        ("delete", "app/a"),
    ]
    assert lines[1]["value"]["secret"] == "***"
    assert (lines[2]["value"], lines[2]["version"], lines[2]["resync"]) == (2, 2, None)
    assert lines[3]["cause"] == "deleted"


# --------------------------------------------------------------------------- objects


def test_an_object_is_stored_listed_fetched_and_removed(cli: Cli, tmp_path: Path) -> None:
    content = secrets.token_bytes(2_500_000)
    (tmp_path / "in.bin").write_bytes(content)
    bucket = f"test-{secrets.token_hex(4)}"
    name = f"{bucket}/deep/in.bin"
    assert cli("objects", "put", name, "in.bin").out.startswith(f"redis-object://{name}  2.4 MiB  sha256 ")
    (info,) = cli("objects", "ls", bucket, "--json").json
    assert (info["bucket"], info["name"], info["size_bytes"]) == (bucket, "deep/in.bin", 2_500_000)
    table = cli("objects", "ls").out
    line = next(line for line in table.splitlines() if line.startswith(name))
    assert "2.4 MiB" in line
    assert "ago)" in line
    assert cli("objects", "get", name, "out.bin") == Done(0, "", "")
    assert (tmp_path / "out.bin").read_bytes() == content
    assert (
        cli("objects", "get", f"redis-object://{name}", "-").out.encode(errors="surrogateescape") == content
    )
    assert cli("objects", "rm", name) == Done(0, "", "")
    gone = Done(1, "", f"dynamo-redis: no such object: redis-object://{name}\n")
    assert cli("objects", "rm", name) == gone
    assert cli("objects", "get", name, "-") == gone
    assert cli("objects", "get", name, "again.bin") == gone
    assert not (tmp_path / "again.bin").exists()
    assert cli("objects", "ls", bucket, "--json").json == []


def test_an_object_can_come_from_standard_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 3_000_000)))
    name = f"test-{secrets.token_hex(4)}/in"
    (info,) = cli("objects", "put", name, "-", "--json").json
    assert info["size_bytes"] == 3_000_000
    assert cli("objects", "rm", name, "--json").json[0]["removed"] is True


def test_wrong_names_and_files_are_one_line(cli: Cli) -> None:
    assert cli("objects", "put", "no-bucket", "f").err == (
        "dynamo-redis: 'no-bucket' does not name an object: write BUCKET/NAME\n"
    )
    assert cli("objects", "put", "b/n", "absent") == Done(
        1, "", "dynamo-redis: absent: No such file or directory\n"
    )


def test_a_large_object_has_a_progress_bar_on_a_terminal(environment: None, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(6 << 20))
    name = f"test-{secrets.token_hex(4)}/large"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dynamo_redis", "objects"]
    put = subprocess.Popen(
        [*command, "put", name, "large"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    drawn = everything(ours)  # a terminal holds only 4 KiB that nothing has read
    os.close(ours)
    out, _ = put.communicate(timeout=60)
    assert put.returncode == 0
    assert f"put {name}" in drawn
    assert "6.3/6.3 MiB" in drawn or "6.0/6.0 MiB" in drawn
    assert out.decode().startswith("redis-object://")
    subprocess.run([*command, "rm", name], check=True)


def test_unreadable_objects_end_their_list_with_1(
    cli: Cli, tmp_path: Path, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    (tmp_path / "x").write_bytes(b"content")
    for name in ("b/good", "b/torn"):
        assert cli("objects", "put", name, str(tmp_path / "x")).code == 0
    with redis.Redis.from_url(dynamo_redis_url) as admin:
        admin.set(ObjectKeys(dynamo_redis_prefix, "b", "torn").current, "a string")
    shown = cli("objects", "ls")
    assert (shown.code, shown.err) == (1, "dynamo-redis: 1 object cannot be read: see above\n")
    assert shown.out.splitlines()[2].startswith("b/good ")
    assert "should be a hash" in shown.out.splitlines()[3]
    good, torn = json.loads(cli("objects", "ls", "--json").out)
    assert (good["name"], list(torn)) == ("good", ["error"])


def everything(terminal: int) -> str:
    """Read what is written to a terminal until its other side is closed."""
    read = b""
    with contextlib.suppress(OSError):  # Linux's way to say that it is closed
        while part := os.read(terminal, 1 << 16):
            read += part
    return read.decode()


# --------------------------------------------------------------------------- what can go wrong


COMMANDS = (
    ["instances"],
    ["models", "--json"],
    ["get", "k"],
    ["put", "k", "v"],
    ["del", "k"],
    ["watch", ""],
    ["objects", "ls"],
    ["objects", "rm", "b/n"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_server_that_is_not_there_is_one_line(
    command: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_REDIS_URL", "redis://user:s3cret@127.0.0.1:1")
    done = cli(*command)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("dynamo-redis: no Redis answers at 127.0.0.1:1 (connection refused)")
    assert done.err.count("\n") == 1
    assert "s3cret" not in done.err


def test_without_any_server_the_line_says_what_to_do(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYN_REDIS_URL")
    done = cli("instances")
    assert done.code == 2
    assert "set DYN_REDIS_URL (or --redis-url)" in done.err
    assert "`dynamo-redis up`" in done.err


def test_a_write_on_a_replica_fails_in_one_line(tmp_path: Path) -> None:
    """In a child process, whose stderr also has the log."""
    server = EmbeddedServer(tmp_path, port=0)
    anyio.run(server.start)
    client = redis.Redis.from_url(server.url)
    try:
        run = [sys.executable, "-m", "dynamo_redis", "put", "--redis-url", server.url]
        assert subprocess.run([*run, "app/a", "1"], check=False).returncode == 0
        client.replicaof("127.0.0.1", "1")
        done = subprocess.run([*run, "app/a", "2"], check=False, capture_output=True, text=True)
    finally:
        client.close()
        anyio.run(server.stop)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "set DYN_REDIS_URL to the primary" in done.stderr


def test_a_wrong_password_is_one_line_and_never_shown(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    server = EmbeddedServer(tmp_path / "locked", port=0, settings={"requirepass": "right"})
    anyio.run(server.start)
    try:
        address = server.url.removeprefix("redis://")
        wrong = cli("instances", "--redis-url", f"redis://:wr0ng@{address}")
        missing = cli("instances", "--redis-url", f"redis://{address}")
        assert cli("instances", "--redis-url", f"redis://:right@{address}", "--json").json == []
    finally:
        anyio.run(server.stop)
    refusal = f"dynamo-redis: Redis at {address} refuses the user name or password of DYN_REDIS_URL"
    assert wrong.err.startswith(refusal)
    assert wrong.err.count("\n") == 1
    assert missing.err.startswith(f"dynamo-redis: Redis at {address} needs a password: ")
    assert (wrong.code, missing.code) == (1, 1)
