"""A small OpenAI-compatible engine: the mock engine behind HTTP and ZeroMQ, as vLLM has them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

from aiohttp import web
from tokenizers import Tokenizer

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.base import BlocksRemoved, BlocksStored, KvEvent
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.mock.engine import MockEngine
from dynamo_redis.errors import InvalidRequest
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.models.vectors import pack
from dynamo_redis.planes.context import Context
from tests.integration.engines.kv_event_server import ALL_CLEARED, KvEventServer, block_removed, block_stored

MODEL_NAME = "the-engines-own-name"
_SAMPLING = ("temperature", "top_p", "seed")


class TestEngine:
    """One run of an engine.

    `owner` is its kind in `/v1/models`: vllm answers with token ids, others with text. `takes_ids` False
    refuses prompts of ids. `name` and `max_model_len` are listed; a request for another model gets 404.
    """

    __test__ = False

    def __init__(
        self,
        *,
        owner: str = "vllm",
        takes_ids: bool = True,
        name: str = MODEL_NAME,
        max_model_len: int | None = None,
        **mock: Any,
    ) -> None:
        model = read_model_directory(DEMO_MODEL_PATH)
        self.mock = MockEngine(MockEngineSettings(**{"speedup_ratio": 0, **mock}), model)
        self.tokenizer = Tokenizer.from_buffer(model.read_tokenizer())
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.chats: list[dict[str, Any]] = []
        """The bodies of chat completions."""
        self.choices: list[dict[str, Any]] = []
        """The choices that a chat completion streams, one an event. After one with `breaks` the connection
        breaks, once `may_break` is set; that one is taken out of the list."""
        self.may_break = asyncio.Event()
        self.fail_with: tuple[int, dict[str, str]] | None = None
        self.refuse_with: tuple[int, str] | None = None
        """Status and message for each completion; `/health` still answers 200."""
        self.name: str | None = name
        """The listed model; None: no model yet."""
        self.max_model_len = max_model_len
        self.listed_count = 0
        self.counted: dict[str, int] = {}
        """The token counts in `usage`."""
        self.give_up_as: str | None = None
        """If set, the next answer ends after its first tokens with an error 404, and the model gets this
        name."""
        self.says_sizes = True
        """True: the metrics have the cache's size."""
        self.says_use = True
        """True: the metrics have the cache's usage."""
        self.measures = True
        """True: `/metrics` answers."""
        self.measured_count = 0
        self.break_off_after: int | None = None
        self.break_off_count = 1 << 30
        """The number of answers that break off."""
        self.cancelled_count = 0
        self.described: dict[str, Any] = {}
        """Answers by path, to `/kv_event_sources` (vLLM) and `/server_info` (SGLang); bytes are sent as they
        are, and a missing one is a 404."""
        self.described_count = 0
        self.events: list[KvEventServer] = []
        self.http_port = 0
        self._owner = owner
        self._takes_ids = takes_ids
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    async def start(self, *, http_port: int = 0, event_port: int = 0, replay_port: int = 0) -> None:
        """Serve. With the ports of an earlier engine this is its restart. Each rank publishes at the port
        after the one of the rank before."""
        await self.mock.start()
        for rank in self.mock.ranks:
            port = event_port and event_port + rank.dp_rank
            server = KvEventServer(port=port, replay_port=replay_port, dp_rank=rank.dp_rank)
            self.events.append(server)
            rank.cache.events = _publish_to(server)
        app = web.Application(client_max_size=64 << 20)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/metrics", self._metrics),
                web.get("/kv_event_sources", self._describe),
                web.get("/server_info", self._describe),
                web.get("/get_server_info", self._describe),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/embeddings", self._embeddings),
                web.post("/reset_prefix_cache", self._reset),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", http_port)
        await site.start()
        self.http_port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Break all connections, as a kill does. Idempotent."""
        if self._runner is not None:
            await self.mock.aclose()
            await self._runner.cleanup()
            self._runner = None
        for server in self.events:
            await server.aclose()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.fail_with[0] if self.fail_with else 200)

    async def _models(self, _: web.Request) -> web.Response:
        self.listed_count += 1
        listed: dict[str, Any] = {"id": self.name, "owned_by": self._owner}
        if self.max_model_len is not None:
            listed["max_model_len"] = self.max_model_len
        return web.json_response({"object": "list", "data": [listed] if self.name else []})

    async def _describe(self, http: web.Request) -> web.Response:
        self.described_count += 1
        if http.path not in self.described:
            return web.json_response({"detail": "Not Found"}, status=404)
        answer = self.described[http.path]
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        return web.Response(body=content, content_type="application/json")

    async def _metrics(self, _: web.Request) -> web.Response:
        self.measured_count += 1
        if not self.measures:
            return web.Response(status=500)
        capacity = self.mock.capacity
        sizes = f'block_size="{capacity.kv_block_size}",num_gpu_blocks="{capacity.total_kv_blocks}"'
        lines = [
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            f'vllm:cache_config_info{{{sizes},enable_prefix_caching="True",engine="0"}} 1.0',
        ]
        if not self.says_sizes:
            lines.clear()
        for load in self.mock.loads():
            labels = f'{{engine="{load.dp_rank}",model_name="{MODEL_NAME}"}}'
            lines += [
                f"vllm:num_requests_running{labels} {load.running_count:.1f}",
                f"vllm:num_requests_waiting{labels} {load.waiting_count:.1f}",
            ]
            if self.says_use and load.active_blocks is not None and load.total_blocks:
                lines.append(f"vllm:kv_cache_usage_perc{labels} {load.active_blocks / load.total_blocks}")
        return web.Response(text="\n".join(lines) + "\n")

    async def _reset(self, _: web.Request) -> web.Response:
        await self.mock.clear_kv_blocks()
        return web.Response()

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.requests.append(body)
        self.headers.append(dict(http.headers))
        if self.fail_with:
            status, headers = self.fail_with
            return web.json_response({"error": {"message": "as told"}}, status=status, headers=headers)
        if self.refuse_with:
            status, message = self.refuse_with
            error = {"error": {"message": message}}
            return web.json_response(error, status=status, headers={"Retry-After": "7"})
        if body["model"] != self.name:
            return web.json_response({"error": {"message": f"no model {body['model']}"}}, status=404)
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        elif not self._takes_ids:
            return web.json_response({"error": {"message": "prompt must be a string"}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            rank = http.headers.get("X-data-parallel-rank")
            await self._answer(_request(body, prompt, rank), http, response)
        except InvalidRequest as exc:
            return web.json_response({"error": {"message": str(exc), "code": 400}}, status=400)
        except (asyncio.CancelledError, ConnectionResetError):
            self.cancelled_count += 1  # the second time if it was about to write
            raise
        return response

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        self.chats.append(await http.json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        for choice in list(self.choices):
            await _send_event(response, json.dumps({"choices": [{"index": 0, **choice}]}))
            if "breaks" in choice:
                await self.may_break.wait()
                self.choices.remove(choice)
                assert http.transport is not None
                http.transport.abort()
                return response
        await _send_event(response, json.dumps({"choices": [], "usage": self.counted}))
        await _send_event(response, "[DONE]")
        return response

    async def _embeddings(self, http: web.Request) -> web.Response:
        """Answer each input with a vector of its number of tokens, 0 and 1, in the reverse order."""
        body = await http.json()
        self.requests.append(body)
        if self.refuse_with:
            status, message = self.refuse_with
            return web.json_response({"error": {"message": message}}, status=status)
        if body["model"] != self.name:
            return web.json_response({"error": {"message": f"no model {body['model']}"}}, status=404)
        if not self._takes_ids and not isinstance(body["input"][0], str):
            return web.json_response({"error": {"message": "input must be strings"}}, status=400)
        if self.break_off_after is not None:
            assert http.transport is not None
            http.transport.abort()
        vectors = [[float(len(one)), 0.0, 1.0][: body.get("dimensions")] for one in body["input"]]
        is_packed = body.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": pack(vector) if is_packed else vector}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": 7, "total_tokens": 7}
        return web.json_response({"object": "list", "data": data[::-1], "model": self.name, "usage": usage})

    async def _answer(
        self, request: GenerateRequest, http: web.Request, response: web.StreamResponse
    ) -> None:
        given: list[int] = []
        given_text = ""
        cached_count = 0
        async with aclosing(self.mock.generate(request, Context())) as items:
            async for item in items:
                if not response.prepared:
                    await response.prepare(http)
                given += item["token_ids"]
                cached_count = item.get("cached_tokens", cached_count)
                text = self.tokenizer.decode(given)
                ended = "finish_reason" in item
                whole = text if ended else text.rstrip("\ufffd")
                await self._send(response, item, whole[len(given_text) :])
                given_text = whole
                if self.give_up_as is not None:
                    self.name, self.give_up_as = self.give_up_as, None
                    error = {"code": 404, "message": "no such model"}
                    await _send_event(response, json.dumps({"error": error}))
                    return
                limit = self.break_off_after
                if limit is not None and self.break_off_count and len(given) >= limit:
                    self.break_off_count -= 1
                    assert http.transport is not None
                    http.transport.abort()
        usage = self.counted | {"prompt_tokens_details": {"cached_tokens": cached_count}}
        await _send_event(response, json.dumps({"choices": [], "usage": usage}))
        await _send_event(response, "[DONE]")

    async def _send(self, response: web.StreamResponse, item: GenerateItem, text: str) -> None:
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": item.get("finish_reason")}
        if self._owner == "vllm":
            choice["token_ids"] = item["token_ids"]
        await _send_event(response, json.dumps({"choices": [choice]}))


async def _send_event(response: web.StreamResponse, data: str) -> None:
    await response.write(f"data: {data}\n\n".encode())


def _request(body: dict[str, Any], prompt: list[int], rank: str | None) -> GenerateRequest:
    stop = {name: body[name] for name in ("max_tokens", "min_tokens", "ignore_eos") if name in body}
    sampling = {name: body[name] for name in _SAMPLING if name in body}
    request: dict[str, Any] = {
        "model": MODEL_NAME,
        "token_ids": prompt,
        "stop_conditions": stop,
        "sampling_options": sampling,
        "eos_token_ids": [],
    }
    if rank is not None:
        request["dp_rank"] = int(rank)
    return cast("GenerateRequest", request)


def _publish_to(server: KvEventServer) -> Any:
    def publish(event: KvEvent) -> None:
        if isinstance(event, BlocksStored):
            stored = block_stored(event.block_hashes, event.parent_hash, list(event.token_ids))
            server.publish([stored])
        elif isinstance(event, BlocksRemoved):
            server.publish([block_removed(event.block_hashes)])
        else:
            server.publish([ALL_CLEARED])

    return publish


@asynccontextmanager
async def running_engine(**options: Any) -> AsyncIterator[TestEngine]:
    """Run an engine on free ports."""
    engine = TestEngine(**options)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


@asynccontextmanager
async def restarted(engine: TestEngine, **options: Any) -> AsyncIterator[TestEngine]:
    """Kill that engine and start another in its place, with an empty cache and sequence 0."""
    ports: Sequence[int] = (engine.http_port, engine.events[0].port, engine.events[0].replay_port or 0)
    await engine.stop()
    another = TestEngine(**options)
    try:
        await another.start(http_port=ports[0], event_port=ports[1], replay_port=ports[2])
        yield another
    finally:
        await another.stop()
