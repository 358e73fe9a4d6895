"""Logins at the NATS server by an NKey, and by a credentials file with a JWT."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.select import make_client, make_server
from tests.nats_server import NatsServer, find_nats_server
from tests.tcp_plane import INSTANCE, SECRET, echo

nkeys = pytest.importorskip("nkeys", reason="no nkeys: install the extra `planes`")
pytestmark = pytest.mark.skipif(
    find_nats_server() is None, reason="no nats-server; on Debian and Ubuntu: apt-get install nats-server"
)


class Key:
    """A pair of keys of an operator, an account or a user."""

    def __init__(self, number: int, kind: str) -> None:
        prefix = getattr(nkeys, f"PREFIX_BYTE_{kind}")
        self.seed: str = nkeys.encode_seed(bytes([number]) * 32, prefix).decode()
        self._pair = nkeys.from_seed(bytearray(self.seed.encode()))
        self.public: str = self._pair.public_key.decode()

    def sign(self, subject: Key, content: dict[str, Any]) -> str:
        """Return a JWT about another key, as `nsc` makes it."""
        claims: dict[str, Any] = {
            "iat": int(time.time()), "iss": self.public, "name": "test", "sub": subject.public,
            "nats": {"version": 2, **content},
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(claims).encode()).digest()
        claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
        signed = ".".join(map(encode, ({"typ": "JWT", "alg": "ed25519-nkey"}, claims)))
        return f"{signed}.{to_text(self._pair.sign(signed.encode()))}"


def encode(value: dict[str, Any]) -> str:
    return to_text(json.dumps(value, separators=(",", ":")).encode())


def to_text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


OPERATOR, ACCOUNT = Key(1, "OPERATOR"), Key(2, "ACCOUNT")
USER, OTHER = Key(3, "USER"), Key(4, "USER")
LIMITS = {"subs": -1, "data": -1, "payload": -1}
ACCOUNT_LIMITS = {**LIMITS, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
JWT_SERVER = f"""
operator: {OPERATOR.sign(OPERATOR, {"type": "operator"})}
resolver: MEMORY
resolver_preload: {{
  {ACCOUNT.public}: {OPERATOR.sign(ACCOUNT, {"type": "account", "limits": ACCOUNT_LIMITS})}
}}
"""
NKEY_SERVER = f"authorization {{ users: [ {{ nkey: {USER.public} }} ] }}"


def credentials(directory: Path, user: Key) -> Path:
    """Write a credentials file for `USER` with the seed of `user`."""
    path = directory / "user.creds"
    jwt = ACCOUNT.sign(USER, {"type": "user", **LIMITS})
    path.write_text(
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
    )
    return path


def login(way: str, user: Key, directory: Path) -> dict[str, Any]:
    if way == "nkey":
        return {"nats_nkey": user.seed}
    return {"nats_credentials_file": credentials(directory, user)}


@pytest.mark.parametrize("way", ["nkey", "credentials file"])
async def test_login_by_key_gets_in(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with NatsServer(tmp_path, NKEY_SERVER if way == "nkey" else JWT_SERVER) as nats:
        settings = PlaneSettings.load(
            request_plane="nats", nats_server=nats.url, **login(way, USER, tmp_path)
        )
        server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
        await server.start()
        server.register("echo", echo)
        client = make_client(settings)
        try:
            to = Target(INSTANCE, server.address, "echo", SECRET)
            assert [item async for item in client.open(to, "hi", Context())] == ["hi"]
            for shown in (repr(settings), repr(server), repr(client), caplog.text):
                assert USER.seed not in shown
        finally:
            await client.aclose()
            await server.aclose()


@pytest.mark.parametrize("way", ["nkey", "credentials file"])
async def test_wrong_key_is_refused_without_its_seed(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with NatsServer(tmp_path, NKEY_SERVER if way == "nkey" else JWT_SERVER) as nats:
        settings = PlaneSettings.load(
            request_plane="nats", nats_server=nats.url, **login(way, OTHER, tmp_path)
        )
        server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
        with pytest.raises(ConfigError, match=r"(?i)authorization") as caught:
            await server.start()
        await server.aclose()
        for shown in (str(caught.value), caplog.text, repr(settings)):
            assert OTHER.seed not in shown
