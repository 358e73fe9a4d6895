"""The example programs that get tokens of clouds, without a cloud."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import importlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.credential_origins import end_of_token
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.server import EmbeddedServer

EXAMPLES = Path(__file__).parents[4] / "examples"
KEY, SECRET_KEY = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


async def whoami(server: EmbeddedServer, hook: str) -> bytes:
    settings = StoreSettings.load(redis_url=server.url, redis_credentials=hook)
    client = open_client(settings.require_url(), timeout_s=5.0, login=settings.login())
    try:
        answer: bytes = await client.execute("ACL", "WHOAMI")
        return answer
    finally:
        await client.aclose()


def signature(host: str, query: list[tuple[str, str]], region: str, service: str) -> str:
    """Return the signature of a presigned request, computed by AWS's description of Signature Version 4."""
    given = dict(query)
    scope = given["X-Amz-Credential"].partition("/")[2]
    day = scope.partition("/")[0]
    assert scope == f"{day}/{region}/{service}/aws4_request"
    signed = sorted(
        (quote(a, safe="-_.~"), quote(b, safe="-_.~")) for a, b in query if a != "X-Amz-Signature"
    )
    line = "&".join(f"{name}={value}" for name, value in signed)
    empty = hashlib.sha256(b"").hexdigest()
    canonical = f"GET\n/\n{line}\nhost:{host}\n\nhost\n{empty}"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{given['X-Amz-Date']}\n{scope}\n{digest}"
    key = f"AWS4{SECRET_KEY}".encode()
    for part in (day, region, service, "aws4_request", text):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key.hex()


@pytest.mark.parametrize(("service", "serverless"), [("elasticache", "1"), ("memorydb", "")])
async def test_token_of_aws_is_signed(
    service: str, serverless: str, own_redis_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("botocore")
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "REDIS_IAM_USER": "app",
        "REDIS_IAM_CACHE": "my-cache",
        "REDIS_IAM_SERVICE": service,
        "REDIS_IAM_SERVERLESS": serverless,
    }.items():
        monkeypatch.setenv(name, value)
    aws_iam_login: Any = importlib.import_module("aws_iam_login")
    user, token, end = aws_iam_login.token()
    pieces = urlsplit(f"http://{token}")
    query = parse_qsl(pieces.query)
    assert (user, pieces.netloc, pieces.path) == ("app", "my-cache", "/")
    assert {("Action", "connect"), ("User", "app"), ("X-Amz-Expires", "900")} <= {*query}
    assert (("ResourceType", "ServerlessCache") in query) == bool(serverless)
    assert dict(query)["X-Amz-Signature"] == signature("my-cache", query, "eu-west-1", service)
    found = end_of_token(token)
    assert found is not None
    assert abs(found - end) < 2
    # A Redis takes any password of a user without one.
    admin = RedisClient(own_redis_server.url, timeout_s=5.0)
    await admin.execute("ACL", "SETUSER", "app", "on", "nopass", "+acl|whoami")
    await admin.aclose()
    assert await whoami(own_redis_server, "aws_iam_login:token") == b"app"


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server, as far as the example asks it."""

    def do_GET(self) -> None:
        is_right = self.headers["Metadata-Flavor"] == "Google" and self.path.endswith("/default/token")
        body = json.dumps({"access_token": "ya29.x", "expires_in": 3599, "token_type": "Bearer"}).encode()
        self.send_response(200 if is_right else 403)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        yield
        server.shutdown()
        thread.join()


async def test_token_of_google_is_taken(metadata: None, own_redis_server: EmbeddedServer) -> None:
    gcp_iam_login: Any = importlib.import_module("gcp_iam_login")
    user, token, end = gcp_iam_login.token()
    assert (user, token) == ("default", "ya29.x")
    assert 3500 < end - time.time() < 3600
    admin = RedisClient(own_redis_server.url, timeout_s=5.0)
    await admin.execute("ACL", "SETUSER", "default", ">ya29.x")
    await admin.aclose()
    assert await whoami(own_redis_server, "gcp_iam_login:token") == b"default"
