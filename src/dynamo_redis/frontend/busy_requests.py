"""`GET` and `POST /busy_threshold`: the busy thresholds of the models, as in Dynamo."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dynamo_redis.errors import StoreError
from dynamo_redis.frontend.administration import Handler, changes_state
from dynamo_redis.frontend.busy import NAMES
from dynamo_redis.frontend.http.errors import invalid, registry_refuses
from dynamo_redis.frontend.models import LiveModels

_MOST_TOKENS = 1 << 53


def busy_threshold(models: LiveModels) -> Handler:
    """Return the handler of both methods."""

    def answer(value: Any) -> Response:
        return Response(json.dumps(value, ensure_ascii=False), media_type="application/json")

    async def change(body: dict[str, Any]) -> Response:
        name, changes = read_change(body)
        models.named(name)  # raises ApiError 404 for an unknown model
        if changes:
            try:
                await models.thresholds.change(name, changes)
            except StoreError as exc:
                raise registry_refuses(exc) from exc
            await models.count_load(name)
        return answer(models.thresholds.describe(name))

    changing = changes_state(change)

    async def handle(request: Request) -> Response:
        if request.method == "POST":
            return await changing(request)
        return answer({"thresholds": [models.thresholds.describe(model.name) for model in models.served()]})

    return handle


def read_change(body: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Return the model and the thresholds that a body sets. Null sets nothing, as in Dynamo. Raises ApiError
    400."""
    for name in body:
        if name not in ("model", *NAMES):
            raise invalid(f"Unknown parameter: '{name[:64]}'.", name[:64], "unknown_parameter")
    model = body.get("model")
    if model is None:
        raise invalid("Missing required parameter: 'model'.", "model", "missing_required_parameter")
    if not isinstance(model, str):
        raise invalid("'model' must be a text.", "model", "invalid_value")
    changes: dict[str, float] = {}
    for name in NAMES:
        value = body.get(name)
        if value is None:
            continue
        if name == "active_prefill_tokens_threshold":
            is_valid, wanted = type(value) is int and 0 <= value < _MOST_TOKENS, "a whole number from 0 on"
        else:
            is_valid, wanted = type(value) in (int, float) and value >= 0, "a number from 0 on"
            is_valid = is_valid and math.isfinite(value)
            if name == "active_decode_blocks_threshold":
                is_valid, wanted = is_valid and value <= 1, "a number from 0 to 1"
        if not is_valid:
            raise invalid(f"'{name}' must be {wanted}.", name, "invalid_value")
        changes[name] = value
    return model, changes
