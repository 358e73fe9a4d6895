"""`dynamo-redis acl`: rules for users of Redis with the least rights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import cast

import click

from dynamo_redis.cli.failures import CommandFailed
from dynamo_redis.cli.options import SettingsCommand, load, setting_options
from dynamo_redis.cli.output import json_option, print_json, print_line
from dynamo_redis.cli.roles import ROLES, Form, Role, rules
from dynamo_redis.config import PlaneSettings, StoreSettings
from dynamo_redis.wire.tunnel import encode_part

_USER = re.compile(r"[^\s\0]+")
PLACEHOLDER = ">PASSWORD"
"""Printed where no password is given: the operator replaces it."""


@click.command("acl", cls=SettingsCommand)
@click.option(
    "--role",
    "roles",
    type=click.Choice(ROLES),
    multiple=True,
    help="What the user is for. Repeatable.  [default: each role]",
)
@click.option("--user", metavar="NAME", help="Name of the user, with one --role.  [default: the role's name]")
@click.option(
    "--password-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with the password; its SHA-256 is printed. Without it the line has {PLACEHOLDER}.",
)
@click.option("--aclfile", is_flag=True, help="Print lines for the server's aclfile, not for redis-cli.")
@click.option(
    "--server",
    "form",
    type=click.Choice(["7.0", "6.2"]),
    default="7.0",
    show_default=True,
    help="Language of the rules: 7.0 also for later Redis and for Valkey.",
)
@json_option
@setting_options(PlaneSettings, "request_plane")
@setting_options(StoreSettings, "prefix")
def acl(
    roles: tuple[str, ...],
    user: str | None,
    password_file: Path | None,
    aclfile: bool,
    form: str,
    as_json: bool,
    **options: str | None,
) -> None:
    """Print rules for users of Redis that have no more rights than their processes need.

    \b
    worker    serves a model: uploads its files, publishes KV events and load
    router    the router service: follows KV events, keeps snapshots, exchanges bookings
    frontend  as a router, and reads models
    admin     also: objects, locks and event streams of each name, by the commands of this program
    viewer    reads everything under the prefix, writes nothing

    All but the viewer write to the registry. No user may use CONFIG (it shows passwords), and none reaches
    keys outside the prefix. It connects to no server. `dynamo-redis doctor URL` tells which roles a user can
    have.

    \b
    Examples:
      dynamo-redis acl --role worker --user dyn-worker --password-file worker.txt
      dynamo-redis acl --aclfile > users.acl
      dynamo-redis acl --role viewer | sed "s/PASSWORD/$PASSWORD/" | redis-cli
    """
    chosen = [cast("Role", role) for role in dict.fromkeys(roles or ROLES)]
    if user is not None and len(chosen) != 1:
        raise click.UsageError("--user needs one --role")
    if user is not None and _USER.fullmatch(user) is None:
        raise click.UsageError("a user's name has no spaces")
    prefix = load(StoreSettings, options).prefix
    through_redis = "redis" in load(PlaneSettings, options).planes
    secret = PLACEHOLDER if password_file is None else f"#{_digest(password_file)}"
    rows = []
    for role in chosen:
        name = user or role
        plane_user = encode_part(name) if through_redis else None
        words = ["on", secret, *rules(role, prefix, form=cast("Form", form), plane_user=plane_user)]
        beginning = f"user {name}" if aclfile else f"ACL SETUSER {name} reset"
        rows.append({"role": role, "user": name, "line": " ".join([beginning, *words])})
    if as_json:
        print_json(rows)
        return
    for row in rows:
        print_line(row["line"])


def _digest(path: Path) -> str:
    """Return the SHA-256 of the password in a file, without the line's end. Raises CommandFailed."""
    password = path.read_bytes().removesuffix(b"\n").removesuffix(b"\r")
    if not password:
        raise CommandFailed(f"{path} is empty")
    return hashlib.sha256(password).hexdigest()
