"""The HTTP interface: its routes, and the endpoints that generate nothing."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo_redis.config import FrontendSettings
from dynamo_redis.exposition import CONTENT_TYPE, Source, render
from dynamo_redis.frontend.administration import changes_state, refuse_members
from dynamo_redis.frontend.admission import Admission
from dynamo_redis.frontend.apis import APIS, COUNT_PATH, Api, errors_of
from dynamo_redis.frontend.busy_requests import busy_threshold
from dynamo_redis.frontend.completions import Completions
from dynamo_redis.frontend.dashboard.dashboard import Dashboard
from dynamo_redis.frontend.health import health
from dynamo_redis.frontend.http.errors import ApiError, api_error, invalid, shutting_down
from dynamo_redis.frontend.http.request_body import BodyBudget
from dynamo_redis.frontend.http.responses import send_json
from dynamo_redis.frontend.metrics.recording import FrontendMetrics
from dynamo_redis.frontend.metrics.text import FrontendReading, ServedModel, families
from dynamo_redis.frontend.model import NamedModel
from dynamo_redis.frontend.model_list import model_routes
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.frontend.openapi.document import OPENAPI_PATH, document_bytes
from dynamo_redis.frontend.prompts import Preparation
from dynamo_redis.frontend.token_count import token_count
from dynamo_redis.frontend.tokenization import tokenization
from dynamo_redis.names import EndpointName, with_hex_ids
from dynamo_redis.store.base import Registry

ClearCaches = Callable[[Collection[EndpointName]], Awaitable[tuple[int, dict[str, Any]]]]
"""Clears the caches of the workers at these endpoints. Returns status and body. Raises StoreError."""


def make_app(
    models: LiveModels,
    preparation: Preparation,
    settings: FrontendSettings,
    registry: Registry,
    clear_caches: ClearCaches,
    process_metrics: Source = tuple,
    grpc_apis: Iterable[Api] = (),
    dashboard: Dashboard | None = None,
) -> ASGIApp:
    """Return the ASGI application. The caller makes and ends its parts. `process_metrics` are shown beside
    those of the frontend itself. `grpc_apis` are served to scopes of the type `grpc`, by their paths.
    Other calls of gRPC get an empty answer: they pass here for the layers around the application."""

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

    @cache
    def document() -> bytes:
        return document_bytes(app.routes, settings)

    async def show_document(_: Request) -> Response:
        return Response(await asyncio.to_thread(document), media_type="application/json")

    admission = Admission(
        settings.max_http_in_flight_count, settings.max_http_queued_count, settings.http_queue_wait_s
    )
    bodies = BodyBudget(int(settings.max_bodies_bytes))
    metrics = FrontendMetrics()

    def completions(api: Api) -> Completions:
        return Completions(api, models, preparation, bodies, settings, metrics, admission)

    async def on_error(request: Request, exc: Exception) -> Response:
        """Answer an error of a route. The server logs an unexpected one, too."""
        return _error(api_error(exc).with_overload_as(settings.overload_status), request.url.path)

    served = {api.path: completions(api) for api in APIS}
    calls = {api.path: completions(api) for api in grpc_apis}
    tokenize, detokenize = tokenization(models, preparation, bodies, settings, admission)
    app = Starlette(
        routes=[
            *model_routes(models),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in served.items()),
            Route(
                COUNT_PATH, token_count(models, preparation, bodies, settings, admission), methods=["POST"]
            ),
            Route("/clear_kv_blocks", changes_state(clear_kv_blocks), methods=["POST"]),
            Route("/busy_threshold", busy_threshold(models), methods=["GET", "POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/version", _show_version),
            Route(OPENAPI_PATH, show_document),
            Route("/health", show_health),
            Route("/live", _show_live),
            Route("/metrics", show_metrics),
            *(dashboard.routes(metrics, admission) if dashboard is not None else ()),
        ],
        exception_handlers={
            HTTPException: _on_http_exception,
            ApiError: on_error,
            Exception: on_error,
        },
    )

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        """Call the completions without the router and its layers, which take part in each write: a tenth of
        the frontend's time."""
        direct: ASGIApp | None = (
            served.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        )
        if scope["type"] == "grpc":
            direct = calls.get(scope["path"]) or _accept
        if direct is not None:
            await direct(scope, receive, send)
            return
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:  # by the server, at the end of its shutdown
            with suppress(RuntimeError):  # the response has begun
                await _error(shutting_down(), scope["path"])(scope, receive, send)

    return serve


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


async def _accept(scope: Scope, receive: Receive, send: Send) -> None:
    await send_json(send, 200, b"")


async def _show_version(_: Request) -> Response:
    return _json(200, {"version": version("dynamo-redis")})


async def _show_live(_: Request) -> Response:
    return _json(200, {"status": "live"})


def _json(status: int, value: Any) -> Response:
    return Response(
        json.dumps(with_hex_ids(value), ensure_ascii=False), status, media_type="application/json"
    )


def _error(error: ApiError, path: str) -> Response:
    headers = {str(name, "latin-1"): str(value, "latin-1") for name, value in error.headers()}
    status, body = errors_of(path).response(error, uuid.uuid4().hex)
    return Response(body, status, headers, media_type="application/json")


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    """Answer an unknown path or method, with the known ones. OPTIONS gets the methods."""
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
    response = _error(error, request.url.path)
    response.headers.update(exc.headers or {})
    return response
