"""`make audit`: the packages it looks at, and its end with and without a database that answers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tools.audit import audit, requirements_to_run

ADVISORY = {
    "id": "PYSEC-0000-1",
    "summary": "reads what it should not",
    "affected": [
        {
            "package": {"name": "broken", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}],
        }
    ],
}


class Osv(BaseHTTPRequestHandler):
    """Answers as the OSV database does: the package `broken` is vulnerable."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_broken = asked["package"]["name"] == "broken"
        body = json.dumps({"vulns": [ADVISORY]} if is_broken else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def database() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_audit_looks_at_what_the_product_needs() -> None:
    names = {line.partition("==")[0] for line in requirements_to_run()}
    assert {"redis", "hiredis", "pydantic", "pydantic-core", "uvicorn", "aiohttp"} <= names
    assert not {"dynamo-redis", "pytest", "mypy", "playwright"} & names


@pytest.mark.parametrize(("package", "code"), [("broken==1.0", 1), ("sound==1.0", 0)])
def test_audit_fails_for_a_vulnerable_package(
    package: str, code: int, database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--osv-url", database, "--cache-dir", str(tmp_path)]
    assert audit([package, "other==3.0"], options) == code
    printed = capsys.readouterr().out
    assert f"2 packages, {code} with known vulnerabilities" in printed
    assert ("broken 1.0: PYSEC-0000-1, fixed in 2.0: reads what it should not" in printed) is bool(code)


def test_audit_without_a_network_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound, and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        assert audit(["sound==1.0"], ["--osv-url", url, "--cache-dir", str(tmp_path)]) == 0
    assert "cannot be reached, nothing was audited" in capsys.readouterr().out


def test_audit_that_cannot_be_made_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(["sound==1.0"], ["--no-such-option"]) == 1
    assert "no-such-option" in capsys.readouterr().err
