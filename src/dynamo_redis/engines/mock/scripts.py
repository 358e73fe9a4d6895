"""Answers of the mock engine that a request prescribes: a text in its prompt, or a JSON schema.

A message that ends with `<mock_answer>TEXT</mock_answer>` is answered with TEXT. So a test can have any
answer: tool calls in the model's own format, reasoning, malformed ones. Only the last message counts, so a
conversation that goes on, with the result of a tool call, gets an ordinary answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from dynamo_redis.engines.mock.instances import instance_text
from dynamo_redis.engines.text import TextEncoder
from dynamo_redis.errors import InvalidRequest
from dynamo_redis.models.llm_protocol import GUIDED_BY

BEGIN: Final = "<mock_answer>"
END: Final = "</mock_answer>"

_LONGEST_AFTER: Final = 48
"""The most characters that a chat template writes after the last message, without special tokens."""

_LAST_TOKENS: Final = 40


class TextTokenizer(TextEncoder, Protocol):
    """The part of `tokenizers.Tokenizer` that scripts use."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


class Scripts:
    """Finds the answers that requests prescribe, as tokens of one tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def answer(self, prompt: Sequence[int], guided: object) -> list[int] | None:
        """Return the tokens of a prescribed answer; None if the request does not prescribe one.

        Raises InvalidRequest for a form that the engine cannot keep to.
        """
        text = self._of_form(guided) if guided else self._of_prompt(prompt)
        return None if text is None else self._tokenizer.encode(text, add_special_tokens=False).ids

    def _of_form(self, guided: object) -> str:
        if not isinstance(guided, Mapping) or not isinstance(guided.get("json"), Mapping):
            raise InvalidRequest(
                "the mock engine has no model: of 'guided_decoding' it knows JSON schemas alone "
                f"({GUIDED_BY})"
            )
        return instance_text(guided["json"])

    def _of_prompt(self, prompt: Sequence[int]) -> str | None:
        last = self._tokenizer.decode(list(prompt[-_LAST_TOKENS:]), skip_special_tokens=True)
        _, found, after = last.rpartition(END)
        if not found or len(after) > _LONGEST_AFTER:
            return None
        text = self._tokenizer.decode(list(prompt), skip_special_tokens=True)
        _, found, text = text.rpartition(END)[0].rpartition(BEGIN)
        return text if found else None
