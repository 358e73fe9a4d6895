"""F10: our frontend with `worker openai`, and gateways written in Rust, in front of the same two engines."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import httpx

from benchmarks.frontend.prompts import MODEL, model_directory
from benchmarks.frontend.saturated import alternate
from benchmarks.frontend.sides import (
    READY_S,
    Side,
    callers,
    our_frontend,
    our_redis,
    our_worker,
)
from benchmarks.harness.chats import chat_body
from benchmarks.harness.processes import REPOSITORY, free_port, rival_python, running
from benchmarks.harness.report import Measured, median

GATEWAYS: Final = {
    "smg": ("smg==1.13.0", "-m", "smg.launch_router"),
    "sglang-router": ("sglang-router==0.3.2", "-m", "sglang_router.launch_router"),
    "vllm-router": ("vllm-router==0.1.17", "-m", "vllm_router.launch_router"),
}
"""The package of each gateway, and its program."""
ENGINES: Final = 2


def against_gateways(rounds: int) -> dict[str, Measured]:
    """Measure F10, in requests/s; the rival is the gateway with the best median."""
    with ExitStack() as stack:
        model = stack.enter_context(model_directory())
        caller = stack.enter_context(callers(model))
        engines = [stack.enter_context(_engine(model)) for _ in range(ENGINES)]
        sides = {"ours": stack.enter_context(_ours(model, engines))}
        sides |= {name: stack.enter_context(_gateway(name, engines)) for name in GATEWAYS}
        taken = alternate("F10", rounds, caller, {}, sides)
    per_s = {name: [figures.per_s for figures in each] for name, each in taken.items()}
    best = max(GATEWAYS, key=lambda name: median(per_s[name]))
    print(f"F10: the best gateway is {best}", flush=True)
    return {"F10": Measured.against(per_s["ours"], per_s[best])}


@contextmanager
def _engine(model: Path) -> Iterator[str]:
    """Run an engine until the block ends, and yield its URL, ready or not."""
    port = free_port()
    arguments = [str(port), MODEL, str(model / "tokenizer.json")]
    command = [sys.executable, "-m", "benchmarks.frontend.rivals.fake_engine", *arguments]
    with running(command, {}, cwd=REPOSITORY):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _ours(model: Path, engines: list[str]) -> Iterator[Side]:
    with ExitStack() as stack:
        workers = stack.enter_context(our_redis(model))
        for url in engines:
            options = ("--engine-url", url, "--engine-kind", "vllm")
            workers.pids.append(stack.enter_context(our_worker(workers, "openai", model, *options)))
        yield stack.enter_context(our_frontend(workers))


@contextmanager
def _gateway(name: str, engines: list[str]) -> Iterator[Side]:
    """Run a gateway until the block ends, and yield it when it serves the model."""
    package, *program = GATEWAYS[name]
    port = free_port()
    options = [
        *("--worker-urls", *engines, "--policy", "round_robin"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-port", str(free_port()), "--prometheus-host", "127.0.0.1", "--log-level", "error"),
    ]
    command = [rival_python(name, package), *program, *options]
    with running(command, {}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        side = Side(port, {"frontend": [process.pid]})
        _await_answers(side)
        yield side


def _await_answers(side: Side) -> None:
    """Wait until a gateway answers as often as there are engines: it lists no models of its own. Raises
    RuntimeError."""
    deadline = time.monotonic() + READY_S
    body = chat_body(MODEL, "Hello!", stream=True)
    answer_count = 0
    while answer_count < ENGINES:
        with suppress(httpx.TransportError):
            answer = httpx.post(f"{side.url}/v1/chat/completions", json=body, timeout=5)
            answer_count += answer.status_code == 200
        if time.monotonic() > deadline:
            raise RuntimeError(f"the gateway at {side.url} does not answer after {READY_S:g} s")
        time.sleep(0.1)
