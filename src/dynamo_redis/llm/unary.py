"""Endpoints of tokens that are asked once and answer once, under the names of `dynamo.llm`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_redis.llm.model_names import ModelInput, ModelType
from dynamo_redis.llm.registration import register_model
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.call import Call
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.runtime.unary import serve_unary_endpoint


@dataclass(frozen=True)
class UnaryChatModel:
    """A chat model whose whole answer is the return value of a coroutine function.

    It is served at `<service_name>.app.generate`. `public_model_name` is the name in requests; None: the
    service's. `chat_template` replaces the template of the files at `model_path`.
    """

    model_path: str
    service_name: str
    public_model_name: str | None = None
    chat_template: Path | None = None

    async def serve(self, runtime: DistributedRuntime, handler: Callable[..., Awaitable[Any]]) -> None:
        """Register the model, and serve `handler(request, *, context)` until shutdown. Raises as
        `register_model` and `serve_endpoint` do."""
        endpoint = runtime.endpoint(f"{self.service_name}.app.generate")
        await register_model(
            ModelInput.Tokens,
            ModelType.Chat,
            endpoint,
            self.model_path,
            self.public_model_name or self.service_name,
            custom_template_path=self.chat_template,
        )
        await serve_unary_endpoint(endpoint, handler)


class LLMUnaryClient:
    """A client of a `generate` endpoint that returns each answer as a whole."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @classmethod
    async def connect(cls, runtime: DistributedRuntime, endpoint_name: str) -> LLMUnaryClient:
        """Return a client of an endpoint that has an instance."""
        client = await runtime.endpoint(endpoint_name).client()
        await client.wait_for_instances()
        return cls(client)

    async def complete(self, request: Mapping[str, Any], *, context: Context | None = None) -> dict[str, Any]:
        """Return the last item of the answer, with the tokens of all items.

        Raises ValueError for a request that asks for several choices or for logprobs, RuntimeError for an
        answer that is malformed or broken off, and PlaneError.
        """
        _check_request(request)
        return await _collect(await self._client.round_robin(request, annotated=False, context=context))


def with_engine_data(completion: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of an answer with `values` added to its `engine_data`.

    Raises ValueError if there are such keys already, or if one of these is no mapping.
    """
    parts: list[object] = [completion, values]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError("a completion and the values must be mappings")
    present = completion.get("engine_data") or {}
    if not isinstance(present, Mapping):
        raise ValueError(f"engine_data={present!r} must be a mapping")
    if twice := sorted(set(present) & set(values)):
        raise ValueError(f"engine_data has {', '.join(map(repr, twice))} already")
    return {**completion, "engine_data": {**present, **values}} if values else dict(completion)


def _check_request(request: Mapping[str, Any]) -> None:
    """Raise ValueError for a request whose answer is no single list of tokens."""
    sampling, output = (request.get(part) or {} for part in ("sampling_options", "output_options"))
    if not isinstance(sampling, Mapping) or not isinstance(output, Mapping):
        raise ValueError("sampling_options and output_options must be mappings")
    if sampling.get("n") not in (None, 1):
        raise ValueError(f"n={sampling['n']!r}: one choice can be collected")
    if output.get("logprobs") is not None or output.get("prompt_logprobs") is not None:
        raise ValueError("logprobs are not collected")


async def _collect(call: Call) -> dict[str, Any]:
    """Return the last item with the tokens of all. Raises RuntimeError; ends the call in any case."""
    token_ids: list[int] = []
    last: dict[str, Any] | None = None
    async with call:
        async for item in call:
            if last is not None:
                raise RuntimeError("the answer goes on after its finish_reason")
            tokens = item.get("token_ids") if isinstance(item, dict) else None
            if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                raise RuntimeError(f"{item!r} is no item with token_ids")
            if item.get("index", 0) != 0:
                raise RuntimeError(f"index={item['index']!r}: one choice can be collected")
            token_ids += tokens
            if item.get("finish_reason"):
                last = item
    if last is None:
        raise RuntimeError("the answer ended without a finish_reason")
    return last | {"token_ids": token_ids}
