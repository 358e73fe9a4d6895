"""`GET /v1/models` and `GET /v1/models/{model}`, in OpenAI's form, or in Anthropic's for its clients."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dynamo_redis.frontend.forms.messages import ANTHROPIC_ERRORS
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.model import NamedModel
from dynamo_redis.frontend.models import LiveModels


def model_routes(models: LiveModels) -> list[Route]:
    """Return the routes. A client with the header `anthropic-version` is one of Anthropic's."""

    async def list_models(request: Request) -> Response:
        served = models.served()
        if not _is_anthropic(request):
            return _json({"object": "list", "data": [_for_openai(model) for model in served]})
        listed = [_for_anthropic(model) for model in served]
        ends = {"first_id": listed[0]["id"], "last_id": listed[-1]["id"]} if listed else {}
        return _json({"data": listed, "has_more": False, "first_id": None, "last_id": None, **ends})

    async def retrieve_model(request: Request) -> Response:
        name = request.path_params["model"]
        if not _is_anthropic(request):
            return _json(_for_openai(models.named(name)))
        try:
            return _json(_for_anthropic(models.named(name)))
        except ApiError as exc:
            status, body = ANTHROPIC_ERRORS.response(exc, uuid.uuid4().hex)
            return Response(body, status, media_type="application/json")

    return [Route("/v1/models", list_models), Route("/v1/models/{model:path}", retrieve_model)]


def _json(value: Any) -> Response:
    return Response(json.dumps(value, ensure_ascii=False), media_type="application/json")


def _is_anthropic(request: Request) -> bool:
    return "anthropic-version" in request.headers


def _for_openai(model: NamedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": "dynamo",
        "max_model_len": model.context_length,
    }


def _for_anthropic(model: NamedModel) -> dict[str, Any]:
    created_at = datetime.fromtimestamp(int(model.created_at), UTC)
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": created_at.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": model.context_length,
        "max_tokens": model.context_length,
    }
