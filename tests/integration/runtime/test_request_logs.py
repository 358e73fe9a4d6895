"""Log lines of a handler name its request and trace, over every request plane."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from dynamo_redis.planes.context import Context, current_request
from dynamo_redis.runtime.logging import JsonFormatter
from dynamo_redis.testing import RuntimeFactory

ENDPOINT = "dynamo.backend.generate"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
log = logging.getLogger("a_program_of_a_user")


class Lines(logging.Handler):
    """Keeps the lines as a collector gets them."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.objects.append(json.loads(JsonFormatter("").format(record)))


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


async def stream(request: int, context: Context) -> AsyncIterator[int]:
    log.warning("begun %d", request)
    yield request
    log.warning("ends %d", request)


async def answer(request: int, context: Context) -> int:
    log.warning("begun %d", request)
    return request


@pytest.mark.parametrize("plane", ["tcp", "redis", "http"])
@pytest.mark.parametrize("handler", [stream, answer])
async def test_lines_of_a_handler_name_its_request(
    dynamo_runtime_factory: RuntimeFactory, lines: Lines, plane: str, handler: Any
) -> None:
    worker = await dynamo_runtime_factory(request_plane=plane)
    await worker.endpoint(ENDPOINT).start_serving(handler)
    client = await (await dynamo_runtime_factory(request_plane=plane)).endpoint(ENDPOINT).client()
    await client.wait_for_instances()
    for number in range(3):
        context = Context(f"request-{number}", traceparent=f"00-{TRACE}-{number + 1:016x}-01")
        call = await client.round_robin(number, annotated=False, context=context)
        assert [item async for item in call] == [number]
    assert current_request.get() is None
    log.warning("outside")
    *within, outside = lines.objects
    assert len(within) == (6 if handler is stream else 3)
    for line in within:
        number = int(line["message"].split()[1])
        assert line["request_id"] == f"request-{number}"
        assert (line["trace_id"], line["span_id"]) == (TRACE, f"{number + 1:016x}")
    assert "request_id" not in outside
