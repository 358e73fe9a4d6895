"""The requests of the APIs that generate: the steps of one, from its head to its answer."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

from starlette.types import Receive, Scope, Send

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import DeadlineExceeded, DynamoRedisError, TemplateError
from dynamo_redis.frontend.admission import Admission, Place
from dynamo_redis.frontend.answers import SLACK_TOKENS, AnswerDecoder, EchoingDecoder
from dynamo_redis.frontend.apis import Api
from dynamo_redis.frontend.choices import CompletionChoice
from dynamo_redis.frontend.embedding_answer import EmbeddingDecoder
from dynamo_redis.frontend.embedding_body import EmbeddingOptions
from dynamo_redis.frontend.exchange import Exchange
from dynamo_redis.frontend.forms.base import ResponseForm
from dynamo_redis.frontend.forms.completions import CompletionForm
from dynamo_redis.frontend.forms.extra_fields import ExtraFields
from dynamo_redis.frontend.http.bodies import Body
from dynamo_redis.frontend.http.errors import ApiError, api_error, shutting_down, too_many_choices
from dynamo_redis.frontend.http.framing import STREAMS_EVENTS
from dynamo_redis.frontend.http.request_body import BodyBudget, ClientGone, HeldBody, read_limited
from dynamo_redis.frontend.http.responses import send_json
from dynamo_redis.frontend.metrics.recording import FrontendMetrics, RequestRecord, error_type
from dynamo_redis.frontend.migration import Migration
from dynamo_redis.frontend.model import Model
from dynamo_redis.frontend.model_loading import LoadedModel
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.frontend.observation import OBSERVATION, Observation
from dynamo_redis.frontend.options import CompletionOptions
from dynamo_redis.frontend.parameters import check_headers, unsupported
from dynamo_redis.frontend.prompts import Preparation
from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.models.llm_protocol import EmbeddingRequest, GenerateRequest
from dynamo_redis.planes.context import Context, current_request
from dynamo_redis.router.prompts import OVERRIDE

TIMEOUT_S = "dynamo_redis.timeout_s"
"""The key in a scope of the client's own limit of the request's time, in seconds, or None."""

_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.{0,128})?")


class Completions:
    """The requests of one API that generates, as an ASGI application of its own.

    There is no middleware and no response class around it: a streamed token costs its encoding and its share
    of a write.
    """

    def __init__(
        self,
        api: Api,
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
        self._api = api
        self._models = models
        self._preparation = preparation
        self._bodies = bodies
        self._limit_bytes = int(settings.max_body_bytes)
        self._max_choices_count = settings.max_choices_count
        self._routes_by_cache = settings.router_mode == "kv"
        self._timeout_s = settings.request_timeout_s or None
        self._migration_limit = settings.migration_limit
        self._migration_max_length = settings.migration_max_seq_len

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. The server logs an exception that is raised."""
        try:
            with self._admission.place() as place, self._bodies.hold() as held:
                await self._serve(scope, receive, send, place, held)
        except Exception as exc:
            with suppress(RuntimeError):  # the response has begun: the server closes the connection
                await self._send_error(send, api_error(exc), "")
            raise

    async def _serve(self, scope: Scope, receive: Receive, send: Send, place: Place, held: HeldBody) -> None:
        started_at, arrived_at = time.monotonic(), time.perf_counter()
        request_id, traceparent = "", None
        for name, value in scope["headers"]:
            if name == b"x-request-id" and not request_id and _REQUEST_ID.fullmatch(value):
                request_id = str(value, "ascii")
            elif name == b"traceparent" and _TRACEPARENT.fullmatch(value):
                traceparent = str(value, "latin-1")
        request_id = request_id or uuid.uuid4().hex
        headers = [(name, request_id.encode()) for name in self._api.id_headers]
        timeout_s = min(
            (limit_s for limit_s in (self._timeout_s, scope.get(TIMEOUT_S)) if limit_s is not None),
            default=None,
        )
        deadline = None if timeout_s is None else started_at + timeout_s
        context = Context(request_id, deadline=deadline, traceparent=traceparent)
        current_request.set(context)
        observation: Observation | None = scope.get(OBSERVATION)
        if observation is not None:
            observation.begin(self._api.kind, context)
        try:
            check_headers(scope["headers"])
            async with asyncio.timeout(timeout_s):
                body, notes, model, requests = await self._read(scope, receive, place, held)
        except ClientGone:
            self._metrics.note_gone(self._api.kind)
            if observation is not None:
                observation.error_type = "cancelled"
            return
        except (TimeoutError, ApiError, DynamoRedisError, asyncio.CancelledError) as exc:
            error = _refusal(exc).with_overload_as(self._overload_status)
            self._metrics.refuse(self._api.kind, error)
            if observation is not None:
                observation.error_type = error_type(error)
            await self._send_error(send, error, request_id, headers)
            return
        count = len(requests)
        contexts = [context]
        if count > 1:
            contexts = [
                Context(f"{request_id}-{index}", deadline=deadline, traceparent=context.traceparent)
                for index in range(count)
            ]
        record = self._metrics.begin(
            model.name, self._api.kind, is_stream=bool(body.stream), started_at=arrived_at
        )
        if observation is not None:
            record.observation = observation
            observation.note_prepared(
                model.name, count, is_stream=bool(body.stream), max_tokens=body.wanted_tokens
            )
        form = self._form_of(model, body, notes, arrived_at)
        exchange = self._make_exchange(form, model, body, requests, contexts, record, held)
        if body.stream:
            scope[STREAMS_EVENTS] = True
            await exchange.stream(receive, send, headers)
        else:
            await exchange.respond(receive, send, headers)

    def _form_of(
        self, model: Model, body: CompletionOptions, notes: bytes, arrived_at: float
    ) -> ResponseForm:
        form = self._api.form(model.name, body, notes)
        if body.extra_fields and isinstance(form, CompletionForm):
            form.extra = ExtraFields(body.extra_fields, arrived_at)
        return form

    async def _send_error(
        self, send: Send, error: ApiError, request_id: str, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        status, body = self._api.errors.response(error, request_id)
        await send_json(send, status, body, [*error.headers(), *headers])

    async def _read(
        self, scope: Scope, receive: Receive, place: Place, held: HeldBody
    ) -> tuple[CompletionOptions, bytes, Model, list[GenerateRequest]]:
        """Read a request. Return its options and notes, its model, and the requests to the workers. It takes
        its place as soon as it has arrived, before the work that it costs.

        A request over the context of the chosen version of the model goes to the version with the longest
        context. Raises ApiError, DynamoRedisError and ClientGone.
        """
        content = await read_limited(scope, receive, self._limit_bytes, held)
        await place.take(receive)  # the time-out of the reading bounds the wait, too
        if self._api.read is not None:
            body = await self._api.read(content)
        else:
            body = await self._preparation.read(self._api.body, content)
        del content
        if body.choice_count > self._max_choices_count:
            raise too_many_choices(body.choice_count, self._max_choices_count)
        if not self._routes_by_cache and body.options.routing().get(OVERRIDE):
            raise unsupported("nvext.router_config_override", "this frontend does not route by KV caches")
        model = self._models.get(body.options.model, self._api.can_serve)
        try:
            model, requests = await self._prepare(model, body)
        except (ApiError, TemplateError) as exc:
            raise api_error(exc).renamed(self._api.names) from exc
        held.grow_to(0 if body.media is None else body.media.size_bytes * len(requests))
        return body.options, body.notes, model, requests

    async def _prepare(self, model: Model, body: Body) -> tuple[Model, list[GenerateRequest]]:
        """Return the requests of a body, and the version of the model that they are for."""
        assert model.loaded is not None
        try:
            return model, await self._preparation.requests(model.loaded, body)
        except ApiError as exc:
            longer = self._models.with_longer_context(model, self._api.can_serve)
            if exc.code != "context_length_exceeded" or longer is None or longer.loaded is None:
                raise
            return longer, await self._preparation.requests(longer.loaded, body)

    def _make_exchange(
        self,
        form: ResponseForm,
        model: Model,
        body: CompletionOptions,
        requests: list[GenerateRequest],
        contexts: list[Context],
        record: RequestRecord,
        held: HeldBody,
    ) -> Exchange:
        async def generate(request: GenerateRequest, context: Context, excluded: Collection[int]) -> Any:
            return await self._models.generate(model, request, context, excluded)

        assert model.loaded is not None
        if isinstance(body, EmbeddingOptions):
            # A few bytes of input may have megabytes of vectors.
            choices, hold = (
                [_embeddings(body, requests[0], contexts[0], model.loaded.tokenizer)],
                held.grow_to,
            )
        else:
            choices, hold = self._answers(model, model.loaded, body, requests, contexts), None
        return Exchange(form, choices, generate, record, self._overload_status, hold)

    def _answers(
        self,
        model: Model,
        loaded: LoadedModel,
        body: CompletionOptions,
        requests: list[GenerateRequest],
        contexts: list[Context],
    ) -> list[CompletionChoice]:
        """Return a choice for each request."""
        tokenizer = loaded.tokenizer
        limit = self._migration_limit
        if limit is None:
            limit = self._models.migration_limit(model)
        max_length = self._migration_max_length
        decoders: list[Callable[..., AnswerDecoder]] = [AnswerDecoder] * len(requests)
        if body.echoes:
            decoders = [
                partial(EchoingDecoder, tokenizer.decode(request["token_ids"])) for request in requests
            ]
        parsed = loaded.parsing.of_request(body)
        return [
            CompletionChoice(
                index,
                request,
                decoder(
                    tokenizer.detokenizer(parsed.shown),
                    body.stops,
                    keeps_stop=body.keeps_stops,
                    keeps_tokens=limit > 0,
                    most_tokens=loaded.context_length + SLACK_TOKENS,
                    token_bytes=None if body.wanted_logprobs is None else tokenizer.token_bytes,
                    top_count=body.wanted_logprobs or 0,
                    reasoning=parsed.counter(tokenizer, request["token_ids"]),
                ),
                context,
                Migration(request, limit, max_length) if limit else None,
                parsed.maker(tokenizer, request["token_ids"]),
            )
            for index, (request, context, decoder) in enumerate(
                zip(requests, contexts, decoders, strict=True)
            )
        ]


def _embeddings(
    body: EmbeddingOptions, request: GenerateRequest, context: Context, tokenizer: Tokenizer
) -> CompletionChoice:
    """Return the choice of a request for embeddings: all of them are one answer."""
    token_ids = cast("EmbeddingRequest", request)["token_ids"]
    return CompletionChoice(0, request, EmbeddingDecoder(tokenizer.detokenizer(), body, token_ids), context)


def _refusal(error: Exception | asyncio.CancelledError) -> ApiError:
    """Return the response for an error of reading a request. It is cancelled when the server has to end."""
    if isinstance(error, asyncio.CancelledError):
        return shutting_down()
    if isinstance(error, TimeoutError):
        return api_error(DeadlineExceeded("the request was not read and tokenized before its deadline"))
    return api_error(error)
