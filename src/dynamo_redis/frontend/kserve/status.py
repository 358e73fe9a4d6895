"""Errors of the API as gRPC status codes."""

from __future__ import annotations

from typing import Final, NamedTuple

import grpc

from dynamo_redis import errors

_BY_CODE: Final = {
    errors.Overloaded.code: grpc.StatusCode.RESOURCE_EXHAUSTED,
    "body_too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.HandlerFailed.code: grpc.StatusCode.INTERNAL,
    errors.EngineFailed.code: grpc.StatusCode.INTERNAL,
}
"""Codes of errors that say more than the HTTP status."""

_BY_STATUS: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    529: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Refusal(NamedTuple):
    """The end of a request in an error. `metadata` are those behind the response."""

    status: grpc.StatusCode
    message: str
    metadata: tuple[tuple[str, str], ...] = ()


def refusal_of(error: bytes, metadata: tuple[tuple[str, str], ...] = ()) -> Refusal:
    """Read an error: its HTTP status, its code and its text, in lines."""
    http_status, code, message = error.decode(errors="replace").split("\n", 2)
    status = _BY_CODE.get(code) or _BY_STATUS.get(int(http_status), grpc.StatusCode.UNKNOWN)
    return Refusal(status, message, metadata)
