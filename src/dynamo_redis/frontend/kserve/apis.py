"""The calls that generate, as APIs of the frontend."""

from __future__ import annotations

from functools import partial
from typing import Final

from dynamo_redis.frontend.apis import Api
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
