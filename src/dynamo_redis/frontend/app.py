"""The HTTP interface: its routes, and the steps of a request."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import DeadlineExceeded, DynamoRedisError
from dynamo_redis.exposition import CONTENT_TYPE, Source, render
from dynamo_redis.frontend.administration import changes_state, refuse_members
from dynamo_redis.frontend.admission import Admission, Place
from dynamo_redis.frontend.answers import SLACK_TOKENS, AnswerDecoder
from dynamo_redis.frontend.busy_requests import busy_threshold
from dynamo_redis.frontend.exchange import CompletionChoice, Exchange, send_error
from dynamo_redis.frontend.health import health
from dynamo_redis.frontend.http.errors import ApiError, api_error, invalid, too_many_choices
from dynamo_redis.frontend.http.framing import STREAMS_EVENTS
from dynamo_redis.frontend.http.request_body import BodyBudget, ClientGone, read_limited
from dynamo_redis.frontend.http.sse import Kind
from dynamo_redis.frontend.metrics.recording import FrontendMetrics, RequestRecord, error_type
from dynamo_redis.frontend.metrics.text import FrontendReading, ServedModel, families
from dynamo_redis.frontend.migration import Migration
from dynamo_redis.frontend.model import Model, NamedModel
from dynamo_redis.frontend.model_loading import LoadedModel
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.frontend.observation import OBSERVATION, Observation
from dynamo_redis.frontend.openai import ChatBody, TextBody
from dynamo_redis.frontend.options import CompletionOptions
from dynamo_redis.frontend.parameters import check_headers
from dynamo_redis.frontend.prompts import Preparation
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.names import EndpointName, with_hex_ids
from dynamo_redis.planes.context import Context, current_request
from dynamo_redis.store.base import Registry

ClearCaches = Callable[[Collection[EndpointName]], Awaitable[tuple[int, dict[str, Any]]]]
"""Clears the caches of the workers at these endpoints. Returns status and body. Raises StoreError."""

_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.{0,128})?")


def make_app(
    models: LiveModels,
    preparation: Preparation,
    settings: FrontendSettings,
    registry: Registry,
    clear_caches: ClearCaches,
    process_metrics: Source = tuple,
) -> ASGIApp:
    """Return the ASGI application. The caller makes and ends its parts. `process_metrics` are shown beside
    those of the frontend itself."""

    async def list_models(_: Request) -> Response:
        listed = [_describe(model) for model in models.served()]
        return _json(200, {"object": "list", "data": listed})

    async def retrieve_model(request: Request) -> Response:
        return _json(200, _describe(models.named(request.path_params["model"])))

    async def show_health(_: Request) -> Response:
        return _json(*health(models.served(), registry))

    async def clear_kv_blocks(body: dict[str, Any]) -> Response:
        refuse_members(body)
        return _json(
            *await clear_caches(
                {version.source.endpoint for model in models.served() for version in model.loaded()}
            )
        )

    async def show_metrics(_: Request) -> Response:
        served = [describe_served(model, models) for model in models.served()]
        reading = FrontendReading.of(metrics, served, waiting_count=admission.waiting_count)
        found = [*families(reading), *process_metrics()]
        return Response(await asyncio.to_thread(render, found), media_type=CONTENT_TYPE)

    async def show_live(_: Request) -> Response:
        return _json(200, {"status": "live"})

    def completions(kind: Kind, body: type[CompletionOptions]) -> Completions:
        return Completions(kind, body, models, preparation, bodies, settings, metrics, admission)

    admission = Admission(
        settings.max_http_in_flight_count, settings.max_http_queued_count, settings.http_queue_wait_s
    )
    bodies = BodyBudget(int(settings.max_bodies_bytes))
    metrics = FrontendMetrics()

    served: dict[str, Completions] = {
        "/v1/chat/completions": completions("chat", ChatBody),
        "/v1/completions": completions("text", TextBody),
    }
    app = Starlette(
        routes=[
            Route("/v1/models", list_models),
            Route("/v1/models/{model:path}", retrieve_model),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in served.items()),
            Route("/clear_kv_blocks", changes_state(clear_kv_blocks), methods=["POST"]),
            Route("/busy_threshold", busy_threshold(models), methods=["GET", "POST"]),
            Route("/health", show_health),
            Route("/live", show_live),
            Route("/metrics", show_metrics),
        ],
        exception_handlers={
            HTTPException: _on_http_exception,
            ApiError: _on_error,
            Exception: _on_error,
        },
    )

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        """Call the completions without the router and its layers, which take part in each write: a tenth of
        the frontend's time."""
        direct = served.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (direct or app)(scope, receive, send)

    return serve


class Completions:
    """`POST /v1/chat/completions` and `POST /v1/completions`, as an ASGI application of its own.

    There is no middleware and no response class around it: a streamed token costs its encoding and its share
    of a write.
    """

    def __init__(
        self,
        kind: Kind,
        body: type[CompletionOptions],
        models: LiveModels,
        preparation: Preparation,
        bodies: BodyBudget,
        settings: FrontendSettings,
        metrics: FrontendMetrics,
        admission: Admission,
    ) -> None:
        self._metrics = metrics
        self._admission = admission
        self._overload_status = settings.overload_status
        self._kind: Kind = kind
        self._body = body
        self._models = models
        self._preparation = preparation
        self._bodies = bodies
        self._limit_bytes = int(settings.max_body_bytes)
        self._max_choices_count = settings.max_choices_count
        self._timeout_s = settings.request_timeout_s or None
        self._migration_limit = settings.migration_limit
        self._migration_max_length = settings.migration_max_seq_len

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. The server logs an exception that is raised."""
        try:
            with self._admission.place() as place:
                await self._serve(scope, receive, send, place)
        except Exception as exc:
            with suppress(RuntimeError):  # the response has begun: the server closes the connection
                await send_error(send, api_error(exc))
            raise

    async def _serve(self, scope: Scope, receive: Receive, send: Send, place: Place) -> None:
        started_at, arrived_at = time.monotonic(), time.perf_counter()
        request_id, traceparent = "", None
        for name, value in scope["headers"]:
            if name == b"x-request-id" and not request_id and _REQUEST_ID.fullmatch(value):
                request_id = str(value, "ascii")
            elif name == b"traceparent" and _TRACEPARENT.fullmatch(value):
                traceparent = str(value, "latin-1")
        request_id = request_id or uuid.uuid4().hex
        headers = [(b"x-request-id", request_id.encode())]
        deadline = None if self._timeout_s is None else started_at + self._timeout_s
        context = Context(request_id, deadline=deadline, traceparent=traceparent)
        current_request.set(context)
        observation: Observation | None = scope.get(OBSERVATION)
        if observation is not None:
            observation.begin(self._kind, context)
        try:
            check_headers(scope["headers"])
            async with asyncio.timeout(self._timeout_s):
                body, model, requests = await self._read(scope, receive, place)
        except ClientGone:
            return
        except (TimeoutError, ApiError, DynamoRedisError) as exc:
            late = DeadlineExceeded("the request was not read and tokenized before its deadline")
            error = api_error(late if isinstance(exc, TimeoutError) else exc).with_overload_as(
                self._overload_status
            )
            self._metrics.refuse(self._kind, error)
            if observation is not None:
                observation.error_type = error_type(error)
            await send_error(send, error, headers)
            return
        count = len(requests)
        contexts = [context]
        if count > 1:
            contexts = [
                Context(f"{request_id}-{index}", deadline=deadline, traceparent=context.traceparent)
                for index in range(count)
            ]
        record = self._metrics.begin(
            model.name, self._kind, is_stream=bool(body.stream), started_at=arrived_at
        )
        if observation is not None:
            record.observation = observation
            observation.note_prepared(
                model.name, count, is_stream=bool(body.stream), max_tokens=body.wanted_tokens
            )
        exchange = self._make_exchange(model, body, requests, contexts, record)
        if body.stream:
            scope[STREAMS_EVENTS] = True
            await exchange.stream(receive, send, headers, includes_usage=body.includes_usage)
        else:
            await exchange.respond(receive, send, headers)

    async def _read(
        self, scope: Scope, receive: Receive, place: Place
    ) -> tuple[CompletionOptions, Model, list[GenerateRequest]]:
        """Read a request. Return its options, its model, and the requests to the workers. It takes its place
        as soon as it has arrived, before the work that it costs.

        A request over the context of the chosen version of the model goes to the version with the longest
        context. Raises ApiError, DynamoRedisError and ClientGone.
        """
        with self._bodies.hold() as held:
            content = await read_limited(scope, receive, self._limit_bytes, held)
            await place.take()  # the time-out of the reading bounds the wait, too
            body = await self._preparation.read(self._body, content)
            del content
            if body.choice_count > self._max_choices_count:
                raise too_many_choices(body.choice_count, self._max_choices_count)
            model = self._models.get(body.options.model, self._can_serve)
            assert model.loaded is not None
            try:
                return body.options, model, await self._preparation.requests(model.loaded, body)
            except ApiError as exc:
                longer = self._models.with_longer_context(model, self._can_serve)
                if exc.code != "context_length_exceeded" or longer is None or longer.loaded is None:
                    raise
                return body.options, longer, await self._preparation.requests(longer.loaded, body)

    def _can_serve(self, model: LoadedModel) -> bool:
        return model.template is not None if self._kind == "chat" else model.completes_text

    def _make_exchange(
        self,
        model: Model,
        body: CompletionOptions,
        requests: list[GenerateRequest],
        contexts: list[Context],
        record: RequestRecord,
    ) -> Exchange:
        assert model.loaded is not None
        tokenizer = model.loaded.tokenizer
        limit = self._migration_limit
        if limit is None:
            limit = self._models.migration_limit(model)
        max_length = self._migration_max_length
        choices = [
            CompletionChoice(
                index,
                request,
                AnswerDecoder(
                    tokenizer.detokenizer(),
                    body.stops,
                    keeps_stop=body.keeps_stops,
                    keeps_tokens=limit > 0,
                    most_tokens=model.loaded.context_length + SLACK_TOKENS,
                ),
                context,
                Migration(request, limit, max_length) if limit else None,
            )
            for index, (request, context) in enumerate(zip(requests, contexts, strict=True))
        ]
        prefix = "chatcmpl" if self._kind == "chat" else "cmpl"
        frame = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}

        async def generate(request: GenerateRequest, context: Context, excluded: Collection[int]) -> Any:
            return await self._models.generate(model, request, context, excluded)

        return Exchange(self._kind, frame, choices, generate, record, self._overload_status)


def describe_served(model: NamedModel, models: LiveModels) -> ServedModel:
    """Return what the metrics tell of a served model."""
    cards = [entry.card for entry in model.cards.values()]
    return ServedModel(
        name=model.name,
        context_length=model.context_length,
        kv_block_size=max((card.kv_cache_block_size for card in cards), default=0),
        migration_limit=max((models.migration_limit(version) for version in model.loaded()), default=0),
        instance_count=len(model.instances()),
    )


def _describe(model: NamedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": "dynamo",
        "max_model_len": model.context_length,
    }


def _json(status: int, value: Any) -> Response:
    return Response(
        json.dumps(with_hex_ids(value), ensure_ascii=False), status, media_type="application/json"
    )


def _error(error: ApiError) -> Response:
    headers = {str(name, "latin-1"): str(value, "latin-1") for name, value in error.headers()}
    return Response(error.body_bytes(), error.status, headers, media_type="application/json")


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    """Answer an unknown path or method in OpenAI's form, with the known ones. OPTIONS gets the methods."""
    assert isinstance(exc, HTTPException)
    if request.method == "OPTIONS" and exc.status_code == 405:
        return Response(status_code=204, headers=exc.headers)
    offered = ", ".join(
        f"{'POST' if 'POST' in (route.methods or ()) else 'GET'} {route.path.replace(':path', '')}"
        for route in request.app.routes
        if isinstance(route, Route)
    )
    error = invalid(f"Unknown request: {request.method} {request.url.path}. There are: {offered}.")
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "")
        error = invalid(f"Not allowed to {request.method} on {request.url.path}: it takes {allowed}.")
    error.status = exc.status_code
    error.code = "unknown_url" if exc.status_code == 404 else "method_not_allowed"
    response = _error(error)
    response.headers.update(exc.headers or {})
    return response


async def _on_error(_: Request, exc: Exception) -> Response:
    """Answer an error of a route. The server logs an unexpected one, too."""
    return _error(api_error(exc))
