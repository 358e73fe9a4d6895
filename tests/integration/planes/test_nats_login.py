"""Logins at the NATS server, by the settings that NATS users know."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError, PlaneError
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.select import make_client, make_server
from tests.nats_server import NatsServer, find_nats_server
from tests.tcp_plane import INSTANCE, SECRET, echo

PASSWORD = "p4ssw0rd-of-the-test"
TOKEN = "t0ken-of-the-test"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "user": (
        f'authorization {{ user: "dyn", password: "{PASSWORD}" }}',
        {"nats_username": "dyn", "nats_password": PASSWORD},
    ),
    "token": (f'authorization {{ token: "{TOKEN}" }}', {"nats_token": TOKEN}),
}

pytestmark = pytest.mark.skipif(
    find_nats_server() is None, reason="no nats-server; on Debian and Ubuntu: apt-get install nats-server"
)


@pytest.mark.parametrize("way", WAYS)
async def test_a_login_gets_in(way: str, tmp_path: Path) -> None:
    login, options = WAYS[way]
    with NatsServer(tmp_path, login) as nats:
        settings = PlaneSettings.load(request_plane="nats", nats_server=nats.url, **options)
        server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
        await server.start()
        server.register("echo", echo)
        client = make_client(settings)
        try:
            to = Target(INSTANCE, server.address, "echo", SECRET)
            assert [item async for item in client.open(to, "hi", Context())] == ["hi"]
            for shown in (repr(settings), repr(server), repr(client)):
                assert PASSWORD not in shown
                assert TOKEN not in shown
        finally:
            await client.aclose()
            await server.aclose()


@pytest.mark.parametrize("way", WAYS)
async def test_a_wrong_login_is_named_without_its_secret(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    login, options = WAYS[way]
    wrong = {name: f"{value}-wrong" for name, value in options.items()}
    with NatsServer(tmp_path, login) as nats:
        url = (
            nats.url.replace("nats://", "nats://someone:a-secret-in-the-url@") if way == "user" else nats.url
        )
        settings = PlaneSettings.load(request_plane="nats", nats_server=url, connect_timeout_s=1.0, **wrong)
        server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
        with pytest.raises(ConfigError, match=r"(?i)authorization") as caught:
            await server.start()
        await server.aclose()
        for shown in (str(caught.value), caplog.text, repr(settings)):
            assert "-wrong" not in shown.replace("dyn-wrong", "")
            assert "a-secret-in-the-url" not in shown


async def test_a_login_refused_for_a_while_is_tried_again(tmp_path: Path) -> None:
    """The client of NATS gives up for good when a server ends its connection with an error."""
    login, options = WAYS["token"]
    with NatsServer(tmp_path, login) as nats:
        settings = PlaneSettings.load(
            request_plane="nats", nats_server=nats.url, connect_timeout_s=1.0, **options
        )
        server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
        await server.start()
        server.register("echo", echo)
        client = make_client(settings)
        to = Target(INSTANCE, server.address, "echo", SECRET)

        async def is_answered() -> bool:
            try:
                return [item async for item in client.open(to, "hi", Context())] == ["hi"]
            except PlaneError:
                return False

        async def until(is_wanted: bool) -> None:
            async with asyncio.timeout(30):
                while await is_answered() is not is_wanted:
                    await asyncio.sleep(0.05)

        try:
            await until(True)
            nats.reload('authorization { token: "another" }')
            await until(False)
            nats.reload(login)
            await until(True)
        finally:
            await client.aclose()
            await server.aclose()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nats_server": "nats://127.0.0.1:99999"}, "NATS_SERVER is not nats://"),
        ({"nats_server": "ws://user:secret-of-the-test@127.0.0.1:80"}, "NATS_SERVER is not nats://"),
        ({"nats_server": "redis://127.0.0.1:4222"}, "NATS_SERVER is not nats://"),
        ({"nats_username": "dyn"}, "NATS_AUTH_USERNAME is set and NATS_AUTH_PASSWORD is not"),
        ({"nats_password": "secret-of-the-test"}, "NATS_AUTH_PASSWORD is set and NATS_AUTH_USERNAME is not"),
        (
            {"nats_token": "secret-of-the-test", "nats_nkey": "SU-secret-of-the-test"},
            "NATS_AUTH_TOKEN and NATS_AUTH_NKEY are set",
        ),
        ({"nats_nkey": "SU-secret-of-the-test"}, "NATS_AUTH_NKEY (is no seed|needs nkeys)"),
        (
            {"nats_credentials_file": "/does/not/exist"},
            "NATS_AUTH_CREDENTIALS_FILE(=.* cannot be read| needs nkeys)",
        ),
        ({"nats_credentials_file": __file__}, "NATS_AUTH_CREDENTIALS_FILE(=.* does not have| needs nkeys)"),
    ],
)
def test_a_setting_without_use_is_named_at_once(wrong: dict[str, Any], said: str) -> None:
    settings = PlaneSettings.load(request_plane="nats", **wrong)
    for make in (
        lambda: make_server(settings, secret=SECRET, instance_id=INSTANCE),
        lambda: make_client(settings),
    ):
        with pytest.raises(ConfigError, match=said) as found:
            make()
        assert "secret-of-the-test" not in str(found.value)
