"""A frontend and its users: several chats at a time, and the instances that the frontend would send them
to."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import httpx

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.frontend.http.server import serve_frontend
from dynamo_redis.names import format_instance_id
from dynamo_redis.runtime import Client, DistributedRuntime
from faults.chats import ChatFailed, chat
from faults.history import Outcome
from faults.roles.base import Process
from faults.roles.engine import ENDPOINT, open_runtime

USERS_COUNT: Final = 3
MAX_TOKENS: Final = 12
MIGRATIONS: Final = 3
"""How often an answer may go on at another worker."""
CHAT_TIMEOUT_S: Final = 30.0
LOOK_EVERY_S: Final = 0.05
START_TIMEOUT_S: Final = 45.0


async def run(process: Process) -> None:
    """Serve until the end; chat until told to rest."""
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = FrontendSettings.load(
        http_host="127.0.0.1",
        http_port=0,
        migration_limit=MIGRATIONS,
        model_cache=process.orders.directory / f"{process.orders.process}-models",
    )
    async with open_runtime(process) as runtime, asyncio.TaskGroup() as group:
        group.create_task(serve_frontend(runtime, settings, on_ready=listening.set_result))
        group.create_task(_note_members(process, runtime))
        async with httpx.AsyncClient(base_url=await listening, timeout=CHAT_TIMEOUT_S) as http:
            await _wait_until_served(http)
            process.recorder.note("started", role="frontend", lease=format_instance_id(runtime.instance_id))
            await asyncio.gather(*(_chat_until_rest(process, http) for _ in range(USERS_COUNT)))
        await asyncio.Event().wait()


async def _wait_until_served(http: httpx.AsyncClient) -> None:
    """Wait until all that the frontend starts with is there."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            try:
                async for _ in chat(http, "Hello!", 1):
                    pass
            except ChatFailed:
                await asyncio.sleep(LOOK_EVERY_S)
            else:
                return


async def _chat_until_rest(process: Process, http: httpx.AsyncClient) -> None:
    while not process.resting.is_set():
        prompt = f"Tell me about {process.new_value()}!"

        async def attempt(prompt: str = prompt) -> tuple[Outcome, Any]:
            try:
                return "ok", {"text": "".join([piece async for piece in chat(http, prompt, MAX_TOKENS)])}
            except ChatFailed as exc:
                return "refused", {"error": str(exc)}

        await process.call("chat", attempt, prompt=prompt)
        await process.pause()


async def _open_client(runtime: DistributedRuntime) -> Client:
    """Return a client as soon as the server answers: on a busy machine it may not do so at once."""
    while True:
        try:
            return await runtime.endpoint(ENDPOINT).client()
        except StoreUnavailable:
            await asyncio.sleep(LOOK_EVERY_S)


async def _note_members(process: Process, runtime: DistributedRuntime) -> None:
    """Note the instances that a user sees, whenever they change."""
    known: list[str] = []
    client = await _open_client(runtime)
    while True:
        ids = [format_instance_id(instance_id) for instance_id in client.instance_ids()]
        if ids != known:
            known = ids
            process.recorder.note("members", ids=ids)
        await asyncio.sleep(LOOK_EVERY_S)
