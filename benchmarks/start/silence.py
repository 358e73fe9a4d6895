"""S7: the longest silence of a frontend's `/live` under hostile clients and tenants.

One round sends, one after the other: bodies of 40 MiB of every shape, 256 prompts with 128 answers each, long
chats, trailers without end, bodies that never come, connections that send nothing, readers that do not read,
and chats whose template holds the interpreter or never ends. It also registers a model whose template never
ends. A process of its own asks for `/live` meanwhile, again and again on one connection. The figure is the
longest time from a request to the answer, as a load balancer sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import httpx

from benchmarks.harness.processes import REPOSITORY, Driver, free_port, redis_server, running
from benchmarks.harness.report import Measured
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH

PROGRAM: Final = (sys.executable, "-m", "dynamo_redis")
READY_S: Final = 60.0
ANSWER_S: Final = 120.0
BODY_BYTES: Final = 40 << 20
TRAILER_BYTES: Final = 80 << 20
SLOW_COUNT: Final = 60
SLOW_S: Final = 7.0

CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
HOLDS: Final = "{{ ([[1] * 5] * 60000) | sum(start=[]) }}"
NEVER_ENDS: Final = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
)
TEMPLATES: Final = {
    "holds": "{% if messages | length > 2 %}" + HOLDS + "{% endif %}x",
    "endless": "{% if messages | length > 2 %}" + NEVER_ENDS + "{% endif %}x",
}


def silences(rounds: int) -> dict[str, Measured]:
    """Measure S7, in ms: the longest silence of each round."""
    figures = []
    for number in range(rounds):
        with _deployment() as deployment, _probe(deployment.url) as probe:
            longest = {name: 1e3 * seconds for name, seconds in deployment.silences(probe)}
        worst = max(longest, key=longest.__getitem__)
        figures.append(longest[worst])
        print(f"S7 round {number + 1}: {figures[-1]:.1f} ms, at {worst}", flush=True)
        print("   " + ", ".join(f"{name} {silence:.1f}" for name, silence in longest.items()), flush=True)
    return {"S7": Measured.alone(figures)}


@contextmanager
def _probe(url: str) -> Iterator[Driver]:
    command = [sys.executable, "-m", "benchmarks.start.silence_probe", url]
    with running(command, {}, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Driver(process)


@contextmanager
def _deployment() -> Iterator[Deployment]:
    """Run a frontend, a worker of the demo model and two of tenants, on a Redis of their own."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(redis_server())
        environment = {
            "DYN_REDIS_URL": server.url,
            "DYN_REDIS_PREFIX": "bench-silence",
            "DYN_LOG": "error",
            "DYN_MODEL_CACHE": str(directory / "cache"),
            "DYN_HTTP_RECEIVE_TIMEOUT_S": "5s",
            "DYN_HTTP_SEND_TIMEOUT_S": "5s",
        }
        port = free_port()
        starts = [
            ["frontend", "--http-host", "127.0.0.1", "--http-port", str(port)],
            ["worker", "mock", "--speedup-ratio", "0"],
            *(_tenant(directory, name) for name in ("holds", "endless")),
        ]
        for arguments in starts:
            stack.enter_context(running([*PROGRAM, *arguments], environment))
        deployment = Deployment(port, directory, environment)
        deployment.wait_for_models({"demo", "holds", "endless"})
        yield deployment


def _tenant(directory: Path, name: str) -> list[str]:
    """Return the command of a worker whose model has a template of `TEMPLATES`."""
    path = directory / name
    shutil.copytree(DEMO_MODEL_PATH, path, ignore=shutil.ignore_patterns("__pycache__"))
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATES[name]}))
    place = ["--endpoint", f"dynamo.{name}.generate", "--model-name", name, "--model-path", str(path)]
    return ["worker", "mock", "--speedup-ratio", "0", *place]


class Deployment:
    """One frontend, and the attacks on it."""

    def __init__(self, port: int, directory: Path, environment: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._directory = directory
        self._environment = environment

    def wait_for_models(self, names: set[str]) -> None:
        """Wait until the models are served. Raises RuntimeError."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                served = httpx.get(f"{self.url}/v1/models", timeout=5).json()["data"]
                if names <= {model["id"] for model in served}:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"{names} are not served within {READY_S:g} s")

    def silences(self, probe: Driver) -> Iterator[tuple[str, float]]:
        """Carry out each attack in turn; yield its name, and the longest silence meanwhile, in seconds."""
        self._post(CHAT, _chat("demo", 1))  # the cost of a first chat is not measured
        probe.send()
        probe.answer()
        for name, act in self._acts().items():
            act()
            probe.send()
            yield name, float(probe.answer())

    def _acts(self) -> dict[str, Callable[[], object]]:
        posts: dict[str, tuple[str, bytes]] = {
            "explode": (TEXT, json.dumps({"model": "demo", "prompt": ["a b"] * 256, "n": 128}).encode()),
            "prompts": (
                TEXT,
                json.dumps({"model": "demo", "prompt": ["a b"] * 256, "max_tokens": 9}).encode(),
            ),
            "short messages": (
                CHAT,
                _filled(_CHAT_HEAD + b'"messages":[', b'{"role":"user","content":"a"},', b"]}"),
            ),
            "token ids": (TEXT, _filled(b'{"model":"demo","prompt":[', b"1,", b"]}")),
            "one text": (
                CHAT,
                _filled(_CHAT_HEAD + b'"messages":[{"role":"user","content":"', b"word ", b'"}]}'),
            ),
            "one word": (
                CHAT,
                _filled(_CHAT_HEAD + b'"messages":[{"role":"user","content":"', b"a", b'"}]}'),
            ),
            "unknown field": (CHAT, _filled(_CHAT_HEAD + _MESSAGE + b',"zzz":[', b"[],", b"]}")),
            "tools": (
                CHAT,
                _filled(_CHAT_HEAD + _MESSAGE + b',"tools":[', b'{"function":{"name":"f"}},', b"]}"),
            ),
            "extra list": (
                CHAT,
                _filled(_CHAT_HEAD + b'"messages":[{"role":"user","content":"a","x":[', b"1,", b"]}]}"),
            ),
            "long chat": (CHAT, _chat("demo", 20_000)),
            "template that holds": (CHAT, _chat("holds", 3)),
            "template without end": (CHAT, _chat("endless", 3)),
        }
        acts: dict[str, Callable[[], object]] = {
            name: partial(self._post, path, body) for name, (path, body) in posts.items()
        }
        return acts | {
            "twelve bodies at once": self._many_bodies,
            "trailers": self._trailers,
            "slow clients": self._slow_clients,
            "model without end": self._register_unusable,
        }

    def _post(self, path: str, body: bytes) -> int:
        return httpx.post(f"{self.url}{path}", content=body, timeout=ANSWER_S).status_code

    def _many_bodies(self) -> None:
        body = _filled(_CHAT_HEAD + b'"messages":[{"role":"user","content":"', b"word ", b'"}]}')
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda _: self._post(CHAT, body), range(12)))

    def _trailers(self) -> None:
        block = b"a:b\r\n" * 13_000
        with socket.create_connection(("127.0.0.1", self._port), timeout=ANSWER_S) as client:
            client.sendall(b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
            with contextlib.suppress(OSError):
                for _ in range(TRAILER_BYTES // len(block)):
                    client.sendall(block)

    def _slow_clients(self) -> None:
        """Open connections of three kinds: without a request, with half a body, and without reading the
        answer."""
        whole = json.dumps(
            {**json.loads(_chat("demo", 1)), "max_tokens": 20_000, "ignore_eos": True, "stream": True}
        )
        reading_none = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
        openings = [
            b"",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
            reading_none % (CHAT.encode(), len(whole), whole.encode()),
        ]
        with ExitStack() as stack:
            for number in range(SLOW_COUNT):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", self._port))
                client.sendall(openings[number % 3])
            time.sleep(SLOW_S)

    def _register_unusable(self) -> None:
        """Register the demo model anew, with a template whose trial never ends; wait until it is given up."""
        path = self._directory / "template.jinja"
        path.write_text(NEVER_ENDS)
        self._command("objects", "put", "models/unusable/chat_template.jinja", str(path))
        card = json.loads(self._command("get", "--prefix", "v1/mdc/dynamo/backend/", "--json"))[0]["value"]
        card["display_name"] = "unusable"
        card["files"]["chat_template.jinja"] = {
            "url": "redis-object://models/unusable/chat_template.jinja",
            "sha256": hashlib.sha256(NEVER_ENDS.encode()).hexdigest(),
            "size_bytes": len(NEVER_ENDS),
        }
        self._command("put", "v1/mdc/tenant/backend/generate/5", "-", text=json.dumps(card))
        deadline = time.monotonic() + READY_S
        body = _chat("unusable", 1)
        while time.monotonic() < deadline:
            answer = httpx.post(f"{self.url}{CHAT}", content=body, timeout=ANSWER_S)
            if answer.status_code == 503 and "cannot be loaded" in answer.text:
                return
            time.sleep(0.1)
        raise RuntimeError("the model whose template never ends was not given up")

    def _command(self, *arguments: str, text: str = "") -> str:
        run = subprocess.run(
            [*PROGRAM, *arguments],
            input=text,
            text=True,
            capture_output=True,
            check=True,
            env={**os.environ, **self._environment},
        )
        return run.stdout


_CHAT_HEAD = b'{"model":"demo","max_tokens":1,'
_MESSAGE = b'"messages":[{"role":"user","content":"a"}]'


def _filled(start: bytes, repeated: bytes, end: bytes) -> bytes:
    """Return a body of about `BODY_BYTES`."""
    return start + (repeated * (BODY_BYTES // len(repeated))).rstrip(b",") + end


def _chat(model: str, message_count: int) -> bytes:
    messages = [{"role": "user", "content": "Hi"}] * message_count
    return json.dumps({"model": model, "messages": messages, "max_tokens": 1}).encode()
