"""Decoding of the answer to a request for embeddings: a worker's items in, the entries of `data` out."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Final

from pydantic_core import to_json

from dynamo_redis.errors import ConnectionLost, EngineFailed, InvalidRequest, ProtocolViolation
from dynamo_redis.frontend.answers import AnswerDecoder, openai_reason
from dynamo_redis.frontend.embedding_body import EmbeddingOptions, EncodingFormat
from dynamo_redis.frontend.tokens import Detokenizer
from dynamo_redis.models.llm_protocol import is_count
from dynamo_redis.models.vectors import are_finite, pack, unpack

_LISTS: Final = (list, tuple)

_TURN_COUNT: Final = 32768
"""Numbers that are converted before other requests have their turn of the event loop: some 4 ms."""


class EmbeddingDecoder(AnswerDecoder):
    """Decodes the vectors of one request, item by item, until all inputs have theirs.

    Each vector becomes the JSON of an entry of `data`; entries that come together are joined by commas.
    """

    __slots__ = ("_asked", "_counted", "_input_count", "_length", "_sent_count", "_vector_count", "held")

    def __init__(
        self, detokenizer: Detokenizer, asked: EmbeddingOptions, token_ids: Sequence[Sequence[int]]
    ) -> None:
        """`token_ids` has the tokens of each input. The detokenizer is not used."""
        super().__init__(detokenizer, ())
        self._asked = asked
        self._input_count = len(token_ids)
        self._sent_count = sum(map(len, token_ids))
        self.restart()

    def restart(self) -> None:
        """See `AnswerDecoder`."""
        self._vector_count = 0
        self._counted = 0
        self._length: int | None = None
        self.held: Sequence[Any] = ()
        self.prompt_token_count = self._sent_count

    def feed(self, item: Any) -> str:
        """Return the entries of an item's vectors, of the first ones if there are many. Raises PlaneError."""
        if not isinstance(item, dict):
            raise ProtocolViolation(f"the worker answered with {type(item).__name__}, not with embeddings")
        if (reason := item.get("finish_reason")) is not None:
            openai_reason(reason)  # raises those that are errors
        self.held = _vectors_of(item)
        if self._vector_count + len(self.held) > self._input_count:
            raise ProtocolViolation(
                f"the worker answered {self._input_count} inputs with more embeddings than that"
            )
        usage = item.get("usage", item)
        if isinstance(usage, dict) and is_count(count := usage.get("prompt_tokens")):
            self._counted += count
        return self.feed_held()

    def feed_held(self) -> str:
        """See `AnswerDecoder`."""
        entries, number_count = [], 0
        for vector in self.held:
            entries.append(self._entry(vector))
            self._vector_count += 1
            number_count += self._length or 0
            if number_count >= _TURN_COUNT:
                break
        self.held = self.held[len(entries) :]
        if self._vector_count == self._input_count:
            self.finish_reason = "stop"
            self.prompt_token_count = self._counted or self._sent_count
        return ",".join(entries)

    def _entry(self, vector: Any) -> str:
        """Return the entry of the next vector. Raises ProtocolViolation, InvalidRequest."""
        try:
            length, written = _converted(vector, self._asked.encoding_format)
        except (TypeError, ValueError, OverflowError) as exc:
            raise ProtocolViolation(f"embedding {self._vector_count} of the worker is wrong: {exc}") from exc
        if self._length not in (None, length):
            raise ProtocolViolation("the worker answered with embeddings of different lengths")
        self._length = length
        if self._asked.dimensions not in (None, length):
            raise InvalidRequest(
                f"dimensions: the engine of this model made embeddings of {length} numbers, not of "
                f"{self._asked.dimensions}"
            )
        return f'{{"object":"embedding","index":{self._vector_count},"embedding":{written}}}'

    def check_complete(self) -> None:
        """See `AnswerDecoder`: all inputs need an embedding."""
        if self.finish_reason is None and not self._vector_count:
            raise EngineFailed("the worker ended its answer without an embedding")
        if self.finish_reason is None:
            raise ConnectionLost("the worker ended its answer before it was complete: embeddings are missing")


def _converted(vector: Any, encoding_format: EncodingFormat) -> tuple[int, str]:
    """Return the length of a vector, and its JSON. Raises TypeError, ValueError, OverflowError."""
    if isinstance(vector, str):
        numbers = unpack(vector)
    elif type(vector) in _LISTS:
        numbers = array("d", vector).tolist()
    else:
        raise TypeError(f"it is {type(vector).__name__}, not a list of numbers or base64")
    if not numbers:
        raise ValueError("it is empty")
    if not are_finite(numbers):
        raise ValueError("it has NaN or infinity")
    if encoding_format == "float":
        return len(numbers), to_json(numbers).decode()
    return len(numbers), f'"{vector if isinstance(vector, str) else pack(numbers)}"'


def _vectors_of(item: dict[str, Any]) -> Sequence[Any]:
    """Return the vectors of an item, in order, of the engines' form or of OpenAI's. Raises
    ProtocolViolation."""
    vectors: Any = item.get("embeddings")
    if vectors is None and type(item.get("data")) in _LISTS:
        try:
            vectors = [entry["embedding"] for entry in sorted(item["data"], key=lambda each: each["index"])]
        except (TypeError, KeyError) as exc:
            raise ProtocolViolation("the worker's 'data' is no list of embeddings") from exc
    if vectors is None:
        return ()
    if type(vectors) not in _LISTS:
        raise ProtocolViolation(f"the worker's 'embeddings' are {type(vectors).__name__}, not a list")
    return vectors  # type: ignore[no-any-return]
