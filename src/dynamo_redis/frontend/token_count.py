"""Anthropic's `POST /v1/messages/count_tokens`: the tokens of a conversation, as its model sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import DeadlineExceeded, DynamoRedisError
from dynamo_redis.frontend.admission import Admission
from dynamo_redis.frontend.anthropic_body import CountBody
from dynamo_redis.frontend.http.errors import api_error
from dynamo_redis.frontend.http.request_body import BodyBudget, ClientGone, read_limited
from dynamo_redis.frontend.model_loading import LoadedModel
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.frontend.prompts import Preparation

CLIENT_LEFT = 499


def token_count(
    models: LiveModels,
    preparation: Preparation,
    bodies: BodyBudget,
    settings: FrontendSettings,
    admission: Admission,
) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint. A count costs as much as preparing an answer, so it takes a place like one."""

    def renders(model: LoadedModel) -> bool:
        return model.template is not None

    async def count(request: Request) -> int:
        with admission.place() as place, bodies.hold() as held:
            content = await read_limited(request.scope, request.receive, int(settings.max_body_bytes), held)
            await place.take(request.receive)
            body = await preparation.read(CountBody, content)
            del content
            model = models.get(body.options.model, renders)
            assert model.loaded is not None
            [token_ids] = await preparation.token_ids(model.loaded, body)
            return len(token_ids)

    async def serve(request: Request) -> Response:
        try:
            async with asyncio.timeout(settings.request_timeout_s or None):
                return JSONResponse({"input_tokens": await count(request)})
        except ClientGone:
            return Response(status_code=CLIENT_LEFT)
        except TimeoutError:
            raise api_error(DeadlineExceeded("the request was not read before its deadline")) from None
        except DynamoRedisError as exc:
            raise api_error(exc) from exc

    return serve
