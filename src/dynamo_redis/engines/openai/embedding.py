"""An OpenAI-compatible server that makes embeddings: requests go to its `/v1/embeddings`."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, cast

from pydantic_core import from_json

from dynamo_redis.engines.embedding_request import BATCH_COUNT, input_ids, wanted_dimensions
from dynamo_redis.engines.openai.engine import OpenAIEngine
from dynamo_redis.engines.openai.wire import UnknownModel
from dynamo_redis.errors import (
    ConnectionLost,
    ContextLengthExceeded,
    Draining,
    InvalidRequest,
    ProtocolViolation,
    RequestCancelled,
)
from dynamo_redis.models.llm_protocol import EmbeddingItem, GenerateItem, GenerateRequest, is_count
from dynamo_redis.planes.context import Context

log = logging.getLogger(__name__)


class OpenAIEmbeddingEngine(OpenAIEngine):
    """An `OpenAIEngine` whose server makes embeddings. Health, load and identity are as there."""

    async def generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateItem, None]:
        """Forward the request, `BATCH_COUNT` inputs at a time, and yield an `EmbeddingItem` for each batch.

        Inputs go as token ids, or as text to a server that takes no ids, which adds special tokens of its
        own. Ends early when the context is stopped. Raises as `OpenAIEngine.generate`.
        """
        inputs = input_ids(request)
        wanted_dimensions(request)
        for start in range(0, len(inputs), BATCH_COUNT):
            try:
                item = await self._embed(request, inputs[start : start + BATCH_COUNT], context)
            except RequestCancelled:
                return
            yield cast("GenerateItem", item)

    async def _embed(
        self, request: Mapping[str, Any], inputs: Sequence[Sequence[int]], context: Context
    ) -> EmbeddingItem:
        """Return the embeddings of a batch, sent as ids unless the server is known to take text alone."""
        refused: InvalidRequest | None = None
        if not self._prompt_as_text:
            try:
                return await self._ask_renamed(request, inputs, context)
            except InvalidRequest as exc:
                # Servers of a known kind take ids: they refused this request for another reason.
                if self._settings.engine_prompt != "auto" or self._server.listed.dialect != "openai":
                    raise
                refused = exc
        if self._tokens is None:
            raise Draining("the engine is not started")
        item = await self._ask_renamed(request, list(map(self._tokens.decode, inputs)), context)
        if not self._prompt_as_text:
            self._prompt_as_text = True
            log.info("the engine takes no token ids (%s): inputs are sent as text", refused)
        return item

    async def _ask_renamed(
        self, request: Mapping[str, Any], inputs: Sequence[Any], context: Context
    ) -> EmbeddingItem:
        """Do as `_ask`, and once more if the server's name for the model has changed."""
        name = self._server.listed.name
        try:
            return await self._ask(request, inputs, context)
        except UnknownModel:
            if not await self._is_renamed(name):
                raise
        return await self._ask(request, inputs, context)

    async def _ask(
        self, request: Mapping[str, Any], inputs: Sequence[Any], context: Context
    ) -> EmbeddingItem:
        """Send one request to the server. `inputs` are token ids or texts."""
        body = {"model": self._server.listed.name, "input": inputs}
        for name in ("encoding_format", "dimensions"):
            if request.get(name) is not None:
                body[name] = request[name]
        headers = {"X-Request-Id": context.id(), **(context.trace_headers() or {})}
        asking = self._server.http.embed(body, headers)
        unsubscribe = context.on_cancel(lambda _: asking.close())
        self._running_count += 1
        self._unanswered.add(asking)
        try:
            return read_embeddings(await asking.content(), len(inputs))
        except ContextLengthExceeded:
            self._server.expire_identity()  # its context length is not the one that it reported
            raise
        except (Draining, ConnectionLost):
            self._poll_now.set()
            raise
        finally:
            self._running_count -= 1
            self._unanswered.discard(asking)
            unsubscribe()
            asking.close()


def read_embeddings(content: bytes, input_count: int) -> EmbeddingItem:
    """Return the item of a server's answer to this many inputs. Raises ProtocolViolation."""
    try:
        answer = from_json(content)
        entries = sorted(answer["data"], key=lambda entry: entry["index"])
        vectors = [entry["embedding"] for entry in entries]
    except (ValueError, TypeError, KeyError) as exc:
        raise ProtocolViolation(f"the engine answered with no list of embeddings: {exc!r}") from exc
    if len(vectors) != input_count:
        raise ProtocolViolation(f"the engine answered {input_count} inputs with {len(vectors)} embeddings")
    item = EmbeddingItem(embeddings=vectors)
    usage = answer.get("usage")
    if isinstance(usage, dict) and is_count(count := usage.get("prompt_tokens")):
        item |= {"prompt_tokens": count, "total_tokens": count}
    return item
