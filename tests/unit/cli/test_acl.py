"""`dynamo-redis acl`: the rules that it prints."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import resources
from pathlib import Path

import pytest

from dynamo_redis.cli.app import run
from dynamo_redis.cli.roles import ROLES, Role, commands_of, rules

SCRIPTS: dict[Role, str] = {
    "frontend": "registry_|object_claim|object_commit|object_renew|stream_(?!keep)|lock_",
    "router": "registry_|object_claim|object_commit|object_renew|stream_(?!keep)|lock_",
    "worker": "registry_|object_claim|object_commit|stream_(?!seek|trim|info|create|beat)",
    "admin": "registry_|object_|lock_",
}
"""The scripts that each role runs."""


def called(role: Role) -> set[str]:
    """The commands that the scripts of a role call, without subcommands."""
    folder = resources.files("dynamo_redis.store") / "scripts"
    texts = [
        file.read_text("utf-8")
        for file in folder.iterdir()
        if file.name.endswith(".lua") and re.match(SCRIPTS[role], file.name)
    ]
    return {name.lower() for text in texts for name in re.findall(r"\w\('([A-Z]{3,})'", text)}


@pytest.mark.parametrize("role", SCRIPTS)
def test_roles_may_send_what_their_scripts_call(role: Role) -> None:
    granted = {command.partition("|")[0] for command in commands_of(role)}
    assert len(called(role)) > 15
    assert called(role) <= granted


@pytest.mark.parametrize("role", ROLES)
def test_no_role_has_categories_or_reach(role: Role) -> None:
    for words in (rules(role, "dynamo"), rules(role, "dynamo", form="6.2")):
        assert "-@all" in words
        assert not [word for word in words if word.startswith(("+@", "+config", "+acl", "+keys", "allkeys"))]
        keys = [word for word in words if "~" in word and "(" not in word]
        assert all("~{dynamo}:" in key or "~{dynamo/" in key for key in keys)


def test_viewer_writes_nothing() -> None:
    words = rules("viewer", "dynamo")
    assert [word for word in words if "~" in word] == ["%R~{dynamo}:*", "%R~{dynamo/*"]
    assert not [word for word in words if word.startswith("&")]


def test_patterns_take_a_prefix_as_text() -> None:
    words = rules("worker", "a[1]*b?")
    assert r"~{a\[1\]\*b\?}:*" in words
    assert r"&__keyspace@0__:{a\[1\]\*b\?}:lease:*" in words


def test_old_servers_get_no_selectors() -> None:
    for role in ROLES:
        line = " ".join(rules(role, "dynamo", form="6.2", plane_user="u"))
        assert "(" not in line
        assert "%R~" not in line
        assert "%W~" not in line
    assert "+sadd" in rules("frontend", "dynamo", form="6.2")


def test_acl_prints_a_line_for_each_role(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["acl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:6] for line in lines] == [
        ["ACL", "SETUSER", role, "reset", "on", ">PASSWORD"] for role in ROLES
    ]


def test_acl_hashes_the_password_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "password"
    file.write_text("s3cret\n")
    arguments = ["acl", "--role", "viewer", "--user", "look", "--aclfile", "--password-file", str(file)]
    assert run(arguments) == 0
    printed = capsys.readouterr()
    digest = hashlib.sha256(b"s3cret").hexdigest()
    assert printed.out.startswith(f"user look on #{digest} resetchannels %R~{{dynamo}}:* ")
    assert "s3cret" not in printed.out + printed.err
    file.write_text("\n")
    assert run(arguments) == 1


def test_acl_knows_prefix_plane_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["acl", "--role", "worker", "--user", "w.1", "--redis-prefix", "p", "--request-plane", "redis", "--json"]) == 0  # fmt: skip # noqa: E501
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["role"], row["user"]) == ("worker", "w.1")
    assert "~{p}:* " in row["line"]
    assert "~{p/plane/requests/w%2e1/*)" in row["line"]
    assert "(+xadd %W~{p/plane/replies/*)" in row["line"]


def test_acl_refuses_a_name_for_several_roles(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["acl", "--user", "x"]) == 2
    assert run(["acl", "--role", "worker", "--user", "x y"]) == 2
    capsys.readouterr()
