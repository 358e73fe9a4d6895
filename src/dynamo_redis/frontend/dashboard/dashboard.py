"""The dashboard of a frontend: its page, and the stream of its state."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo_redis.frontend.admission import Admission
from dynamo_redis.frontend.dashboard.broadcast import MOST_VIEWERS, Broadcast
from dynamo_redis.frontend.dashboard.catalogue import Catalogue
from dynamo_redis.frontend.dashboard.page_state import Assembler, State
from dynamo_redis.frontend.dashboard.problems import ModelView
from dynamo_redis.frontend.dashboard.reading import ProcessReading, WorkerBlocks, read_process
from dynamo_redis.frontend.dashboard.recorder import Recorder
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.http.framing import STREAMS_EVENTS
from dynamo_redis.frontend.http.siblings import ask_siblings
from dynamo_redis.frontend.metrics.recording import FrontendMetrics
from dynamo_redis.frontend.model import NamedModel
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.store.base import Registry
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

PATH: Final = "/dashboard"
READING_PATH: Final = "/dashboard/reading"
"""The state of one process, on the sockets by which frontend processes reach each other."""

LOOK_S: Final = 1.0
"""Seconds between two looks at what has happened."""

_FILES: Final = {
    "page.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
_HEADERS: Final = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Dashboard:
    """Serves the page, and the stream of its state. Use `running` around the server.

    Two tasks run for as long as the frontend: one follows the instances in the registry, one looks each
    second for events. A third one makes the states of the page, while a browser looks (`broadcast.py`).
    """

    def __init__(
        self,
        models: LiveModels,
        registry: Registry,
        wait_for_shutdown: Callable[[], Awaitable[None]],
        siblings: Path | None = None,
    ) -> None:
        """`siblings` is the directory of the sockets of all processes of this port, if there are others."""
        self._models = models
        self._registry = registry
        self._wait_for_shutdown = wait_for_shutdown
        self._siblings = siblings
        self._recorder = Recorder(models, registry)
        self._admission: Admission | None = None
        self._catalogue = Catalogue(models)
        self._assembler = Assembler()
        self._broadcast = Broadcast(self._sample)
        self._supervisor = Supervisor(log, "the dashboard's events")
        self._files = {name: (Path(__file__).parent / "page" / name).read_bytes() for name in _FILES}

    # ----------------------------------------------------------------- lifetime

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look for events while the block runs."""
        tasks = [
            asyncio.create_task(self._recorder.follow(), name="dashboard's instances"),
            asyncio.create_task(self._supervisor.run(self._look), name="dashboard's events"),
            asyncio.create_task(self._end_at_shutdown(), name="dashboard's end"),
        ]
        try:
            yield
        finally:
            self._broadcast.end()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        while True:
            self._recorder.note()
            await asyncio.sleep(LOOK_S)

    async def _end_at_shutdown(self) -> None:
        """End the streams at once: the server waits for them while it drains."""
        await self._wait_for_shutdown()
        self._broadcast.end()

    # ----------------------------------------------------------------- HTTP

    def routes(self, metrics: FrontendMetrics, admission: Admission) -> list[Route]:
        """Return the routes. Metrics and admission are those of the frontend whose state is shown."""
        self._recorder.metrics, self._admission = metrics, admission
        return [
            Route(PATH, self._show("page.html")),
            Route(f"{PATH}/page.css", self._show("page.css")),
            Route(f"{PATH}/page.js", self._show("page.js")),
            Route(f"{PATH}/events", _Stream(self._broadcast), methods=["GET"]),
        ]

    def with_reading(self, app: ASGIApp) -> ASGIApp:
        """Wrap the application that other processes of this port ask: they read the state of this one."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] != READING_PATH:
                await app(scope, receive, send)
                return
            since = scope["query_string"].decode("ascii", "replace")
            reading, _ = self._read(int(since) if since.isdecimal() else 0)
            response = Response(reading.model_dump_json(), media_type="application/json")
            await response(scope, receive, send)

        return serve

    def _show(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        async def show(_: Request) -> Response:
            return Response(self._files[name], headers=_HEADERS, media_type=_FILES[name])

        return show

    # ----------------------------------------------------------------- the state

    def _read(self, since: int) -> tuple[ProcessReading, dict[str, WorkerBlocks]]:
        return read_process(self._models, self._registry, self._recorder, self._admission, since)

    async def _sample(self) -> State:
        """Make the state of the page, from this process and the others of its port."""
        now = self._recorder.clock.wall()
        since = max(int(now) - self._assembler.needs_since, 0)
        others, silent = await self._ask_siblings(since)
        own, blocks = self._read(since)
        await asyncio.sleep(0)  # requests take their turns between the parts of this work
        processes = [own, *others]
        models = [self._model_view(model, processes) for model in self._models.known()]
        instances = self._catalogue.views(self._recorder)
        await asyncio.sleep(0)
        return self._assembler.state(
            now, processes, models, instances, blocks, self._catalogue.cards(), silent
        )

    async def _ask_siblings(self, since: int) -> tuple[list[ProcessReading], list[str]]:
        """Return the readings of the other processes, and the ids of those that gave none."""
        if self._siblings is None:
            return [], []
        readings, silent = [], []
        answers = await ask_siblings(self._siblings, f"{READING_PATH}?{since}", without=str(os.getpid()))
        for process, text in sorted(answers.items()):
            try:
                readings.append(ProcessReading.model_validate_json(text or ""))
            except ValidationError:
                silent.append(process)
        return readings, silent

    def _model_view(self, model: NamedModel, processes: list[ProcessReading]) -> ModelView:
        loaded = model.loaded()
        counts = [process.models.get(model.name, (0, 0)) for process in processes]
        failures = [version.failure for version in model.versions.values() if version.failure]
        return ModelView(
            name=model.name,
            is_served=bool(loaded),
            context_length=model.context_length if loaded else None,
            instance_count=len(model.cards),
            reachable_count=0,  # counted from the states of the instances
            in_flight_count=sum(in_flight for in_flight, _ in counts),
            queued_count=sum(queued for _, queued in counts),
            version_count=self._catalogue.version_count(model),
            failure=failures[-1] if failures else None,
        )


class _Stream:
    """`/dashboard/events`: the state, and its changes. The server ends it when its client is gone."""

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._broadcast.viewer_count >= MOST_VIEWERS:
            raise ApiError(503, f"{MOST_VIEWERS} browsers look at this process already.", code="overloaded")
        scope[STREAMS_EVENTS] = True
        headers = {
            **_HEADERS,
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
        }
        raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
        if scope["method"] == "GET":
            writing = asyncio.create_task(self._write(send), name="write dashboard")
            leaving = asyncio.create_task(_until_gone(receive), name="dashboard's reader")
            try:
                await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (writing, leaving):
                    task.cancel()
                await asyncio.gather(writing, leaving, return_exceptions=True)
        await send({"type": "http.response.body", "body": b""})

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self._broadcast.frames()) as frames:
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
