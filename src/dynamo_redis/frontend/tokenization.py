"""`POST /tokenize` and `POST /detokenize`, in vLLM's forms: the tokens of a text or chat, and back.

Source: vLLM's `entrypoints/openai` (tokenize).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import DeadlineExceeded, DynamoRedisError
from dynamo_redis.frontend.admission import Admission
from dynamo_redis.frontend.http.errors import ApiError, api_error, invalid
from dynamo_redis.frontend.http.request_body import BodyBudget, ClientGone, read_limited
from dynamo_redis.frontend.model_loading import LoadedModel
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.frontend.openai import ChatBody, read_body
from dynamo_redis.frontend.options import CheckedBody, TokenId
from dynamo_redis.frontend.parameters import Parameters
from dynamo_redis.frontend.prompts import Preparation
from dynamo_redis.frontend.tokenize_body import TokenizeBody

DETOKENIZE_LIMIT_BYTES = 4 << 20
"""Largest body of `/detokenize`: it is parsed in this process."""

_CLIENT_LEFT = 499
_LARGE_COUNT = 1024


class DetokenizeBody(CheckedBody):
    """`POST /detokenize`."""

    further_parameters = Parameters(refused={})

    model: str
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


Endpoint = Callable[[Request], Awaitable[Response]]


def tokenization(
    models: LiveModels,
    preparation: Preparation,
    bodies: BodyBudget,
    settings: FrontendSettings,
    admission: Admission,
) -> tuple[Endpoint, Endpoint]:
    """Return both endpoints. Each request takes a place like one for an answer."""

    async def tokenize(request: Request) -> dict[str, Any]:
        with admission.place() as place, bodies.hold() as held:
            content = await read_limited(request.scope, request.receive, int(settings.max_body_bytes), held)
            await place.take(request.receive)
            body = await preparation.read(TokenizeBody, content)
            del content
            renders = isinstance(body.options, ChatBody)
            model = _loaded(models, body.options.model, renders=renders)
            [token_ids] = await preparation.token_ids(model, body)
        names = None
        if body.notes:
            names = [model.tokenizer.token_bytes(each).decode(errors="replace") for each in token_ids]
        return {
            "count": len(token_ids),
            "max_model_len": model.context_length,
            "tokens": token_ids,
            "token_strs": names,
        }

    async def detokenize(request: Request) -> dict[str, Any]:
        with admission.place() as place, bodies.hold() as held:
            limit = min(int(settings.max_body_bytes), DETOKENIZE_LIMIT_BYTES)
            content = await read_limited(request.scope, request.receive, limit, held, setting=None)
            await place.take(request.receive)
            body = await asyncio.to_thread(read_body, DetokenizeBody, b"".join(content))
            model = _loaded(models, body.model, renders=None)
        largest = max(body.tokens, default=-1)
        if largest >= model.tokenizer.vocabulary_size:
            raise invalid(
                f"Token id {largest} is not in the model's vocabulary of {model.tokenizer.vocabulary_size}.",
                "tokens",
            )
        decode = model.tokenizer.decode
        if len(body.tokens) <= _LARGE_COUNT:
            return {"prompt": decode(body.tokens, skip_special_tokens=False)}
        return {"prompt": await asyncio.to_thread(decode, body.tokens, skip_special_tokens=False)}

    def endpoint(answer: Callable[[Request], Awaitable[dict[str, Any]]]) -> Endpoint:
        async def serve(request: Request) -> Response:
            try:
                async with asyncio.timeout(settings.request_timeout_s or None):
                    return JSONResponse(await answer(request))
            except ClientGone:
                return Response(status_code=_CLIENT_LEFT)
            except TimeoutError:
                raise _late() from None
            except DynamoRedisError as exc:
                raise api_error(exc) from exc

        return serve

    return endpoint(tokenize), endpoint(detokenize)


def _loaded(models: LiveModels, name: str, *, renders: bool | None) -> LoadedModel:
    """Return a model that takes conversations, texts, or (None) either. Raises ApiError."""

    def can_serve(model: LoadedModel) -> bool:
        if renders is None:
            return True
        return model.template is not None if renders else model.completes_text

    model = models.get(name, can_serve)
    assert model.loaded is not None
    return model.loaded


def _late() -> ApiError:
    return api_error(DeadlineExceeded("the request was not read before its deadline"))
