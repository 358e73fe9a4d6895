"""The calls that generate, as APIs of the frontend."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from dynamo_redis.frontend.apis import Api
from dynamo_redis.frontend.forms.base import ErrorForm
from dynamo_redis.frontend.kserve.requests import KserveBody, read_request
from dynamo_redis.frontend.kserve.responses import KSERVE_ERRORS, KserveForm
from dynamo_redis.frontend.options import CompletionOptions

SERVICE: Final = "inference.GRPCInferenceService"


def _api(method: str, *, may_stream: bool) -> Api:
    def form(model: str, body: CompletionOptions, _: bytes) -> KserveForm:
        assert isinstance(body, KserveBody)
        return KserveForm(model, body, is_stream_call=may_stream)

    return Api(
        "text",
        f"/{SERVICE}/{method}",
        KserveBody,
        form,
        KSERVE_ERRORS,
        partial(read_request, may_stream=may_stream),
    )


INFER: Final = _api("ModelInfer", may_stream=False)
STREAM_INFER: Final = _api("ModelStreamInfer", may_stream=True)

CHECKED_CALLS: Final = ("ServerMetadata", "ModelMetadata", "ModelConfig")
"""Calls that need no worker, but a key where one is asked for."""


OPENING: Final = "ModelStreamInfer/open"
"""The opening of a stream. Its key is checked at once: a stream counts as a call, also without a request."""


def path_of(method: str) -> str:
    """Return the path of a call."""
    return f"/{SERVICE}/{method}"


ERROR_FORMS: Final[Mapping[str, ErrorForm]] = {
    **{api.path: KSERVE_ERRORS for api in (INFER, STREAM_INFER)},
    **{path_of(method): KSERVE_ERRORS for method in (*CHECKED_CALLS, OPENING)},
}
"""The form of errors of each path."""
