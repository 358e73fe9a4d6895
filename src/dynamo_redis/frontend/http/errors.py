"""What a client is told when a request fails: OpenAI's form of an error, and the HTTP status it goes with.

Source: the error codes page of OpenAI's API guide, and what its Python client makes of a status (404
NotFoundError, 400 BadRequestError, ≥ 500 InternalServerError, which it retries).
"""

from __future__ import annotations

import json
import math
from typing import Any

from dynamo_redis import errors

_INVALID = "invalid_request_error"
_SERVER = "server_error"
_UNAVAILABLE = "service_unavailable"


class ApiError(Exception):
    """An answer that is an error. `param` names the field of the body that caused it, if one did."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """`{"error": {…}}`."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def body_bytes(self) -> bytes:
        """The body as JSON."""
        return json.dumps(self.body(), ensure_ascii=False).encode(errors="replace")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of the answer besides those of its content."""
        if self.retry_after_s is None:
            return []
        return [(b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s)))]


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the body is not what the API takes."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(model: str) -> ApiError:
    """404 for a model that nobody serves."""
    return ApiError(
        404,
        f"The model `{model}` does not exist or is not served now: GET /v1/models lists those that are.",
        param="model",
        code="model_not_found",
    )


def model_loading(model: str) -> ApiError:
    """503 for a model whose files are still being fetched."""
    return ApiError(
        503,
        f"The model `{model}` is being loaded.",
        kind=_UNAVAILABLE,
        code="model_loading",
        retry_after_s=1.0,
    )


def no_workers(model: str, code: str = errors.NoInstances.code) -> ApiError:
    """503 for a model none of whose workers can be reached: they may be about to be replaced."""
    return ApiError(
        503,
        f"no worker of model `{model}` can be reached now; try again",
        kind=_UNAVAILABLE,
        code=code,
        retry_after_s=1.0,
    )


def model_broken(model: str, reason: str) -> ApiError:
    """503 for a model whose files cannot be used here."""
    return ApiError(
        503, f"The model `{model}` cannot be loaded: {reason}", kind=_UNAVAILABLE, code="model_unavailable"
    )


def body_too_large(limit_bytes: int) -> ApiError:
    """413."""
    return ApiError(
        413,
        f"The request body is over the limit of {limit_bytes} bytes (DYN_HTTP_BODY_LIMIT).",
        code="body_too_large",
    )


def bodies_full(limit_bytes: int) -> ApiError:
    """503: the bodies of others take all the room there is."""
    return ApiError(
        503,
        f"All request bodies together are over the limit of {limit_bytes} bytes (DYN_HTTP_BODIES_LIMIT): "
        "try again.",
        kind=_UNAVAILABLE,
        code="overloaded",
        retry_after_s=1.0,
    )


def too_many_choices(wanted_count: int, most_count: int) -> ApiError:
    """400 for a body that asks for too many answers at once."""
    return ApiError(
        400,
        f"You requested {wanted_count} choices (prompts times 'n'): one request may ask for {most_count} "
        "(DYN_HTTP_MAX_CHOICES).",
        param="n",
        code="invalid_value",
    )


def context_length_exceeded(
    prompt_tokens: int, max_tokens: int | None, context_length: int, param: str, *, at_least: bool = False
) -> ApiError:
    """400 for a prompt, or a prompt and its `max_tokens`, that the model's context cannot hold.

    `at_least`: the prompt was not counted to its end.
    """
    wanted = f"{'at least ' if at_least else ''}{prompt_tokens} tokens in the prompt"
    if max_tokens is not None:
        wanted = f"{prompt_tokens + max_tokens} tokens ({wanted}, {max_tokens} in the completion)"
    return ApiError(
        400,
        f"This model's maximum context length is {context_length} tokens, but you requested {wanted}. "
        "Reduce the length of either.",
        param=param,
        code="context_length_exceeded",
    )


# --------------------------------------------------------------------------- from this package's errors

_STATUS: dict[type[errors.DynamoRedisError], tuple[int, str]] = {
    errors.InvalidRequest: (400, _INVALID),
    errors.TemplateError: (400, _INVALID),
    errors.PayloadTooLarge: (413, _INVALID),
    errors.DeadlineExceeded: (504, "timeout_error"),
    errors.NoInstances: (503, _UNAVAILABLE),
    errors.Overloaded: (503, _UNAVAILABLE),
    errors.RateLimited: (429, "rate_limit_error"),
    errors.PayloadBudgetExceeded: (503, _UNAVAILABLE),
    errors.Draining: (503, _UNAVAILABLE),
    errors.NotAccepted: (503, _UNAVAILABLE),
    errors.EndpointNotFound: (503, _UNAVAILABLE),
    errors.CannotConnect: (503, _UNAVAILABLE),
    errors.RequestCancelled: (503, _UNAVAILABLE),
    errors.ConnectionLost: (502, _SERVER),
    errors.InstanceRemoved: (502, _SERVER),
    errors.AuthenticationFailed: (502, _SERVER),
    errors.ProtocolViolation: (502, _SERVER),
    errors.HandlerFailed: (500, _SERVER),
    errors.EngineFailed: (502, _SERVER),
}


def _status_of(error: errors.DynamoRedisError) -> tuple[int, str]:
    """Find the status and type of an error, or those of the nearest error that it is a kind of."""
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), (502, _SERVER))


_UNREACHABLE = (
    errors.NoInstances,
    errors.CannotConnect,
    errors.ConnectionLost,
    errors.AuthenticationFailed,
    errors.Draining,
    errors.NotAccepted,
    errors.EndpointNotFound,
    errors.InstanceRemoved,
)
"""What ends a request because of its way to the worker. Their messages name internal addresses."""


def worker_lost(error: Exception) -> bool:
    """Whether a request ended because of its way to the worker, and not because of what it asks."""
    return isinstance(error, _UNREACHABLE)


def worker_error(error: Exception, model: str, *, begun: bool) -> ApiError:
    """What the client is told of an error of its worker. `begun`: part of the answer had come."""
    if not isinstance(error, _UNREACHABLE):
        return api_error(error)
    if not begun:
        return no_workers(model, error.code)
    status, kind = _status_of(error)
    message = "the worker was lost while answering; this answer is incomplete, send the request again"
    return ApiError(status, message, kind=kind, code=error.code, retry_after_s=1.0 if status == 503 else None)


def api_error(error: Exception) -> ApiError:
    """What the client is told of an error. An unforeseen one is 500, and says no more than its type."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, errors.DynamoRedisError):
        return ApiError(500, f"Internal error: {type(error).__name__}.", kind=_SERVER, code="internal")
    status, kind = _status_of(error)
    param = "messages" if isinstance(error, errors.TemplateError) else None
    retry_after_s = None
    if isinstance(error, errors.Overloaded):
        retry_after_s = error.retry_after_s or 1.0
    elif status in (503, 504):
        retry_after_s = 1.0
    return ApiError(status, str(error), kind=kind, param=param, code=error.code, retry_after_s=retry_after_s)
