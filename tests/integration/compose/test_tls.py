"""compose/tls.yml: valid over single.yml, and all its services speak TLS to each other."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.compose_files import check, health_check, merged, read
from tests.integration.compose.conftest import Deploy, chat

START_S = 90.0


@pytest.fixture
def tls(directory: Path) -> dict[str, Any]:
    return read(directory / "tls.yml")


@pytest.fixture
def compose(directory: Path, tls: dict[str, Any]) -> dict[str, Any]:
    return merged(read(directory / "single.yml"), tls)


def test_tls_file_is_valid_alone_and_merged(compose: dict[str, Any], tls: dict[str, Any]) -> None:
    check(tls)
    check(compose)


def test_each_service_sees_its_own_key_only(compose: dict[str, Any]) -> None:
    for name in ("redis", "frontend", "worker"):
        mounted = [each for each in compose["services"][name]["volumes"] if each.startswith("tls-")]
        assert mounted == [f"tls-{name}:/tls:ro"]


def test_redis_has_no_port_without_tls(compose: dict[str, Any]) -> None:
    command = compose["services"]["redis"]["command"][2]
    assert "--port 0 " in command
    assert "--tls-auth-clients yes" in command
    for name in ("frontend", "worker"):
        assert compose["services"][name]["environment"]["DYN_REDIS_URL"].startswith("rediss://")


def test_certificates_are_made_once_and_renewed(directory: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl on PATH")
    script = directory / "tls" / "make-certificates.sh"
    argv: list[str | Path] = [script, tmp_path / "authority", f"{tmp_path}/redis=0:0=DNS:redis,IP:127.0.0.1"]
    key, cert = tmp_path / "redis" / "tls.key", tmp_path / "redis" / "tls.crt"

    subprocess.run(argv, check=True, capture_output=True)
    assert key.stat().st_mode & 0o777 == 0o400
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    first = cert.read_bytes()

    subprocess.run(argv, check=True, capture_output=True)
    assert cert.read_bytes() == first

    ends_soon = script.read_text().replace("-days 90", "-days 20")
    cert.unlink()
    subprocess.run(["sh", "-c", ends_soon, "sh", *argv[1:]], check=True, capture_output=True)
    short = cert.read_bytes()
    subprocess.run(argv, check=True, capture_output=True)
    assert cert.read_bytes() not in (first, short)


async def test_services_speak_tls_natively(compose: dict[str, Any], deploy: Deploy) -> None:
    deployment = deploy(compose, ["certificates", "redis", "frontend", "worker"])
    if shutil.which("openssl") is None or not deployment.has("redis-cli"):
        pytest.skip("needs openssl, and redis-cli beside redis-server")

    assert await deployment.start("certificates").wait(60) == 0, deployment.logs()
    del deployment.processes["certificates"]
    deployment.start("redis")
    if not await deployment.is_listening("redis", 6379):
        pytest.skip(f"this redis-server was built without TLS\n{deployment.logs()}")
    for host in ("frontend", "worker"):
        deployment.start(host)
    for host in ("redis", "worker", "frontend"):
        await deployment.until_it_succeeds(host, health_check(compose, host))

    authority = ssl.create_default_context(cafile=deployment.containers["frontend"].mounts["/tls"] / "ca.crt")
    url = f"https://127.0.0.1:{deployment.port('frontend', 8000)}"
    async with httpx.AsyncClient(base_url=url, verify=authority, timeout=30.0) as http:
        await chat(http, instances=1, within_s=START_S)
        health = (await http.get("/health")).json()
        assert "+mtls" in str(health["instances"]), health
        clear = await http.get(url.replace("https:", "http:") + "/health")
        assert clear.status_code == 400, clear.text
