"""The door of the HTTP port: keys, web pages of other origins, TLS."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.apis import APIS, COUNT_PATH
from dynamo_redis.frontend.http.door import Door
from tests.certificates import Authority
from tests.integration.frontend.conftest import Frontend, OpenFrontend

BODY = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}


async def test_keys_open_all_paths_but_open_ones(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(http_api_key="first-key, second-key")
    http = frontend.http
    for path in ("/health", "/live", "/metrics"):
        assert (await http.get(path)).status_code == 200
    for method, path in (("GET", "/v1/models"), ("POST", "/clear_kv_blocks"), ("GET", "/no/such/path")):
        answer = await http.request(method, path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for key in ("first-key", "second-key"):
        for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
            answer = await http.post("/v1/chat/completions", json=BODY, headers=headers)
            assert answer.status_code == 200
    for key in ("first-key,second-key", "first-ke", "first-keyx", "FIRST-KEY"):
        headers = {"authorization": f"Bearer {key}"}
        answer = await http.post("/v1/chat/completions", json=BODY, headers=headers)
        assert answer.status_code == 401
        assert "first-key" not in answer.text
    with pytest.raises(openai.AuthenticationError):
        await frontend.client.models.list()
    client = frontend.client.with_options(api_key="second-key")
    assert [model.id async for model in client.models.list()] == ["demo"]


async def test_both_headers_are_taken_on_every_path(open_frontend: OpenFrontend) -> None:
    http = (await open_frontend(http_api_key="first-key,second-key", http_open_paths="-")).http
    paths = [
        ("GET", path) for path in ("/health", "/live", "/metrics", "/version", "/v1/models", "/dashboard")
    ]
    paths += [("POST", api.path) for api in APIS]
    paths += [("POST", path) for path in (COUNT_PATH, "/tokenize", "/detokenize", "/clear_kv_blocks")]
    paths += [("GET", "/busy_threshold"), ("POST", "/busy_threshold"), ("GET", "/no/such/path")]
    for method, path in paths:
        refused = await http.request(method, path, content=b"{}")
        assert refused.status_code == 401, path
        assert "'Authorization: Bearer KEY' or 'x-api-key: KEY'" in refused.text
        assert refused.json()["error"]["type"] == "authentication_error"
        wrong = {"authorization": "Bearer other", "x-api-key": "third-key"}
        assert (await http.request(method, path, content=b"{}", headers=wrong)).status_code == 401
        for headers in (
            {"authorization": "Bearer second-key"},
            {"authorization": "bearer first-key"},
            {"x-api-key": "second-key"},
            {"authorization": "Bearer other", "x-api-key": "first-key"},
        ):
            answer = await http.request(method, path, content=b"{}", headers=headers)
            assert answer.status_code != 401, (path, headers)


async def test_refused_body_leaves_the_connection_clean(open_frontend: OpenFrontend) -> None:
    """The body of a refused request is not taken for the next request."""
    frontend = await open_frontend(http_api_key="key")
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n\r\n"
    answer = await frontend.http.post("/v1/completions", content=smuggled)
    assert answer.status_code == 401
    answer = await frontend.http.get("/v1/models", headers={"x-api-key": "key"})
    assert answer.status_code == 200


async def test_browsers_may_send_the_key_as_password(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(http_api_key="key")
    answer = await frontend.http.get("/dashboard")
    assert (answer.status_code, answer.headers["www-authenticate"].partition(" ")[0]) == (401, "Basic")
    for password, status in (("key", 200), ("wrong", 401)):
        answer = await frontend.http.get("/v1/models", auth=("any", password))
        assert answer.status_code == status
    answer = await frontend.http.post("/v1/chat/completions", json=BODY, auth=("any", "key"))
    assert answer.status_code == 401


async def test_calls_of_grpc_need_a_key_too() -> None:
    """They come to the same application, without a server's address, and to no open path."""
    called: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope["headers"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    sent: list[Any] = []

    async def send(event: Any) -> None:
        sent.append(event)

    door = Door(FrontendSettings.load(http_api_key="key", http_open_paths="/infer"))
    scope: Any = {"type": "grpc", "method": "POST", "path": "/infer", "headers": []}
    await door.wrap(app)(scope, receive, send)
    assert [event["status"] for event in sent if "status" in event] == [401]
    assert not called
    await door.wrap(app)({**scope, "headers": [(b"authorization", b"Bearer key")]}, receive, send)
    assert called


async def test_changed_file_of_keys_counts(open_frontend: OpenFrontend, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the first team\nold-key  # until May\n\n")
    frontend = await open_frontend(http_api_key_file=file, http_open_paths="-")

    async def status(key: str) -> int:
        return (await frontend.http.get("/live", headers={"x-api-key": key})).status_code

    assert await status("old-key") == 200
    assert await status("new-key") == 401
    file.write_text("new-key\n")
    async with asyncio.timeout(30):
        while await status("new-key") != 200:
            await asyncio.sleep(0.05)
    assert await status("old-key") == 401
    file.write_text("")  # not usable: the keys stay
    os.utime(file, (time.time() + 5, time.time() + 5))
    await asyncio.sleep(0)
    assert await status("new-key") == 200


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"http_api_key": " , "}, "a key is empty"),
        ({"http_api_key": "two words"}, "a key is empty, or has spaces"),
        ({"http_api_key_file": "/no/such/file"}, "DYN_HTTP_API_KEY_FILE=/no/such/file: cannot be read"),
        ({"http_cors_origins": "chat.example"}, "DYN_HTTP_CORS_ORIGINS"),
        ({"http_open_paths": "health"}, "DYN_HTTP_OPEN_PATHS"),
        ({"tls_cert_path": "/no/cert"}, "DYN_TLS_CERT_PATH is set and DYN_TLS_KEY_PATH is not"),
        ({"tls_cert_path": "/no/cert", "tls_key_path": "/no/key"}, "DYN_TLS_CERT_PATH=/no/cert: cannot"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        Door(FrontendSettings.load(**settings))
    assert "two words" not in str(refused.value)


async def test_pages_of_allowed_origins_may_call(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(http_cors_origins="https://chat.example", http_api_key="key")
    asked = {
        "origin": "https://chat.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    answer = await frontend.http.options("/v1/chat/completions", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    for key, status in (("key", 200), ("wrong", 401)):
        headers = {"origin": "https://chat.example", "authorization": f"Bearer {key}"}
        answer = await frontend.http.post("/v1/chat/completions", json=BODY, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    answer = await frontend.http.get("/live", headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in answer.headers


async def test_no_page_is_allowed_by_default(frontend: Frontend) -> None:
    answer = await frontend.http.get("/live", headers={"origin": "https://chat.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_port_speaks_tls(open_frontend: OpenFrontend, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    identity = authority.issue("127.0.0.1")
    frontend = await open_frontend(tls_cert_path=identity.cert, tls_key_path=identity.key)
    assert frontend.url.startswith("https://")
    trust = ssl.create_default_context(cafile=str(authority.path))
    async with httpx.AsyncClient(base_url=frontend.url, verify=trust, timeout=20) as http:
        transport: Any = http  # some releases of the client are typed for a package of another name
        client = openai.AsyncOpenAI(base_url=f"{frontend.url}/v1", api_key="none", http_client=transport)
        stream = await client.chat.completions.create(**BODY, stream=True)  # type: ignore[call-overload]
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "Hello, world! How are you?"
        old = (await http.get("/live")).extensions["network_stream"].get_extra_info("ssl_object")
        assert old.version() in ("TLSv1.2", "TLSv1.3")
    with pytest.raises(httpx.ConnectError):  # not its authority
        await frontend.http.get("/live")
    async with httpx.AsyncClient(timeout=20) as plain:
        answer = await plain.get(frontend.url.replace("https", "http") + "/live")
        assert answer.status_code == 400
        assert "https://" in answer.json()["error"]["message"]

    other = Authority(tmp_path, "other")
    other.issue("127.0.0.1").move_to(identity)
    trust = ssl.create_default_context(cafile=str(other.path))
    async with asyncio.timeout(30):
        while True:
            async with httpx.AsyncClient(base_url=frontend.url, verify=trust, timeout=20) as http:
                try:
                    answer = await http.get("/live")
                except httpx.ConnectError:
                    await asyncio.sleep(0.05)
                    continue
                break
    assert answer.status_code == 200


async def test_stalled_handshakes_do_not_stop_others(open_frontend: OpenFrontend, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    identity = authority.issue("127.0.0.1")
    frontend = await open_frontend(
        tls_cert_path=identity.cert, tls_key_path=identity.key, max_http_connections_count=4
    )
    url = httpx.URL(frontend.url)
    assert url.port is not None
    silent = [await asyncio.open_connection(url.host, url.port) for _ in range(20)]
    trust = ssl.create_default_context(cafile=str(authority.path))
    async with httpx.AsyncClient(base_url=frontend.url, verify=trust, timeout=20) as http:
        assert (await http.get("/live")).status_code == 200
    for _, writer in silent:
        writer.close()
