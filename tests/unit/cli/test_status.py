from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from dynamo_redis.cli import probe
from dynamo_redis.cli.status import PlainDisplay, Status, make_display
from dynamo_redis.cli.up import curl_line

SERVING = Status(
    answering=True,
    serving=True,
    redis_away=False,
    workers_count=2,
    running_count=2,
    instances_count=2,
    models=("demo",),
)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "serving, 2/2 workers, model demo"),
        ({"instances_count": 3}, "serving, 2/2 workers, 3 instances registered, model demo"),
        (
            {"running_count": 2, "instances_count": 1},
            "serving, 2/2 workers, 1 instance registered, model demo",
        ),
        ({"redis_away": True}, "serving, 2/2 workers, model demo, Redis is away, serving from the last view"),
        ({"hit_percent": 54}, "serving, 2/2 workers, model demo, 54 % cache hits"),
        ({"models": tuple("abcde")}, "serving, 2/2 workers, models a, b, c and 2 more"),
        (
            {"serving": False, "running_count": 0, "instances_count": 0, "models": ()},
            "no worker can serve, 0/2 workers",
        ),
        (
            {"answering": False, "serving": False, "instances_count": 0, "models": ()},
            "the frontend does not answer, 2/2 workers",
        ),
    ],
)
def test_a_status_in_one_line(
    changes: dict[str, object], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {name: getattr(SERVING, name) for name in Status.__slots__}
    PlainDisplay().status(Status(**{**fields, **changes}))
    assert capsys.readouterr().out == f"status: {line}\n"


def test_off_a_terminal_only_changes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    display = make_display()
    display.status(SERVING)
    display.status(SERVING)
    display.status(replace(SERVING, hit_percent=54))
    display.notice("worker-1 ended")
    display.log("worker-1", "a line")
    display.close()
    assert capsys.readouterr() == (
        "status: serving, 2/2 workers, model demo\nworker-1 ended\n",
        "worker-1 | a line\n",
    )


def test_the_curl_line_survives_any_model_name() -> None:
    words = shlex.split(curl_line("http://localhost:8000", 'it\'s a "model" $HOME'))
    assert words[:2] == ["curl", "http://localhost:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == 'it\'s a "model" $HOME'


def test_curl_line_of_an_embedding_model_sends_a_text() -> None:
    words = shlex.split(curl_line("http://localhost:8000", "vectors", embeds=True))
    assert words[1] == "http://localhost:8000/v1/embeddings"
    assert json.loads(words[-1]) == {"model": "vectors", "input": "Hello!"}


# --------------------------------------------------------------------------- asking a frontend


@asynccontextmanager
async def server(answer: Callable[[asyncio.StreamWriter], None]) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        answer(writer)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def says(answer: bytes) -> Callable[[asyncio.StreamWriter], None]:
    def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    return serve


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b'HTTP/1.0 503 Away\r\nX: y\r\n\r\n{"status": "unhealthy"}', (503, {"status": "unhealthy"})),
        (b"HTTP/1.1 200 OK\r\n\r\nnot JSON", (200, None)),
        (b"SSH-2.0-OpenSSH\r\n", None),
        (b"", None),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * (5 << 20), None),
    ],
)
async def test_a_frontends_answer_is_read(answer: bytes, seen: tuple[int, object] | None) -> None:
    async with server(says(answer)) as url:
        found = await probe.get(url, "/health")
    assert (found and (found.status, found.body)) == seen


async def test_a_frontend_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await probe.get("http://127.0.0.1:1", "/health") is None
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.1)
    writers: list[asyncio.StreamWriter] = []
    async with server(writers.append) as url:
        assert await probe.get(url, "/health") is None
        for writer in writers:
            writer.close()
