"""Errors of the HTTP API: OpenAI's error objects and their HTTP statuses.

Source: the error codes page of OpenAI's API guide, and its Python client's errors by status (404
NotFoundError, 400 BadRequestError, ≥ 500 InternalServerError, which it retries).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Self

from dynamo_redis import errors

_INVALID = "invalid_request_error"
_SERVER = "server_error"
_UNAVAILABLE = "service_unavailable_error"
_RATE_LIMIT = "rate_limit_error"
_RATE_LIMITED_CODE = "rate_limit_exceeded"
_TYPE_OF_OVERLOAD = {429: _RATE_LIMIT, 503: _UNAVAILABLE, 529: "overloaded_error"}
_LONGEST_NAME = 256


class ApiError(Exception):
    """An error response. `param` is the field of the body that caused it, or None."""

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

    def with_overload_as(self, status: int) -> Self:
        """Set the status, and the type that goes with it, if the error is an overload; return the error.
        `status` is 429, 503 or 529."""
        if self.code == errors.Overloaded.code:
            self.status = status
            self.kind = _TYPE_OF_OVERLOAD[status]
        return self

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Use another API's names of the fields: `names`, by the names here. Return the error."""
        for name, other in names.items():
            if self.param is not None and re.match(rf"{re.escape(name)}(?![\w-])", self.param):
                self.message = self.message.replace(f"'{name}", f"'{other}")
                self.param = other + self.param[len(name) :]
                break
        return self

    def body(self) -> dict[str, Any]:
        """Return the body: `{"error": {…}}`. All errors of the status 429 have OpenAI's code for it."""
        code = _RATE_LIMITED_CODE if self.status == 429 else self.code
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": code}
        return {"error": error}

    def body_bytes(self) -> bytes:
        """Return the body as JSON."""
        return json.dumps(self.body(), ensure_ascii=False).encode(errors="replace")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of the response besides those of its content."""
        if self.retry_after_s is None:
            return []
        return [(b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s)))]


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Make the 400 for a body that the API does not accept."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(model: str) -> ApiError:
    """Make the 404 for a model without workers."""
    shown = model if len(model) <= _LONGEST_NAME else f"{model[:_LONGEST_NAME]}…"
    return ApiError(
        404,
        f"The model `{shown}` does not exist or is not served now: GET /v1/models lists the served models.",
        param="model",
        code="model_not_found",
    )


def model_loading(model: str) -> ApiError:
    """Make the 503 for a model that is being loaded."""
    return ApiError(
        503,
        f"The model `{model}` is being loaded.",
        kind=_UNAVAILABLE,
        code="model_loading",
        retry_after_s=1.0,
    )


def no_workers(model: str, code: str = errors.NoInstances.code) -> ApiError:
    """Make the 503 for a model without reachable workers: new workers may be about to come."""
    return ApiError(
        503,
        f"no worker of model `{model}` can be reached now; try again",
        kind=_UNAVAILABLE,
        code=code,
        retry_after_s=1.0,
    )


def model_broken(model: str, reason: str) -> ApiError:
    """Make the 503 for a model that cannot be loaded."""
    return ApiError(
        503, f"The model `{model}` cannot be loaded: {reason}", kind=_UNAVAILABLE, code="model_unavailable"
    )


def body_too_large(limit_bytes: int, setting: str | None) -> ApiError:
    """Make the 413 for a body over the limit, which is that of a setting or of the path."""
    return ApiError(
        413,
        f"The request body is over the limit of {limit_bytes} bytes ({setting or 'of this path'}).",
        code="body_too_large",
    )


def bodies_full(limit_bytes: int) -> ApiError:
    """Make the 503 for a body, or embeddings, that do not fit beside those of other requests."""
    return ApiError(
        503,
        f"All request bodies and embeddings together are over the limit of {limit_bytes} bytes "
        "(DYN_HTTP_BODIES_LIMIT): try again.",
        kind=_UNAVAILABLE,
        code="overloaded",
        retry_after_s=1.0,
    )


def frontend_full(limit: int) -> ApiError:
    """Make the 503 for a request that found no place in time beside the requests under way."""
    return ApiError(
        503,
        f"The frontend has as many requests as it may, {limit} (DYN_HTTP_MAX_IN_FLIGHT): try again.",
        kind=_UNAVAILABLE,
        code="overloaded",
        retry_after_s=1.0,
    )


def connections_full() -> ApiError:
    """Make the 503 for a request that was not whole when its connection was closed in favour of another."""
    return ApiError(
        503,
        "The frontend has as many connections as it may (DYN_HTTP_MAX_CONNECTIONS): send the request again, "
        "in one piece.",
        kind=_UNAVAILABLE,
        code="overloaded",
        retry_after_s=1.0,
    )


def shutting_down() -> ApiError:
    """Make the 503 for a request that is not over when the time of the frontend's shutdown is."""
    return ApiError(
        503,
        "The frontend has ended before this answer was complete: send the request again.",
        kind=_UNAVAILABLE,
        code=errors.Draining.code,
        retry_after_s=1.0,
    )


def registry_refuses(error: Exception) -> ApiError:
    """Make the 503 for a change that Redis does not take now."""
    return ApiError(
        503, f"Not changed: {error}", kind=_UNAVAILABLE, code="registry_unavailable", retry_after_s=1.0
    )


def too_many_choices(wanted_count: int, most_count: int) -> ApiError:
    """Make the 400 for a body that asks for too many answers."""
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
    """Make the 400 for a prompt, or a prompt and its `max_tokens`, over the model's context length.

    `at_least`: the prompt was not tokenized to its end.
    """
    wanted = f"{'at least ' if at_least else ''}{prompt_tokens} tokens in the prompt"
    if max_tokens is not None:
        wanted = f"{prompt_tokens + max_tokens} tokens ({wanted}, {max_tokens} in the completion)"
    return ApiError(
        400,
        f"This model's maximum context length is {context_length} tokens, but you requested {wanted}. "
        f"Reduce the length of {'the prompt' if max_tokens is None else 'either'}.",
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
    errors.RateLimited: (429, _RATE_LIMIT),
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
    errors.HandlerFailed: (502, _SERVER),
    errors.EngineFailed: (502, _SERVER),
}

ERROR_STATUSES = frozenset(status for status, _ in _STATUS.values())
"""The statuses of this package's errors."""


def _status_of(error: errors.DynamoRedisError) -> tuple[int, str]:
    """Return the status and type of an error, or those of its nearest base class."""
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
"""Errors of the connection to a worker. Their messages name internal addresses."""


def worker_lost(error: Exception) -> bool:
    """Return whether the request lost its worker: the request itself did not cause the error."""
    return isinstance(error, _UNREACHABLE)


def worker_error(error: Exception, model: str, *, begun: bool) -> ApiError:
    """Return the response for an error of the worker. `begun`: part of the answer had arrived."""
    if not isinstance(error, _UNREACHABLE):
        return api_error(error)
    if not begun:
        return no_workers(model, error.code)
    status, kind = _status_of(error)
    message = (
        "the worker was lost while answering, or the engine behind it; this answer is incomplete, send the "
        "request again"
    )
    return ApiError(status, message, kind=kind, code=error.code, retry_after_s=1.0 if status == 503 else None)


def api_error(error: Exception) -> ApiError:
    """Return the response for an error. An unexpected one is 500 and names only its type."""
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
