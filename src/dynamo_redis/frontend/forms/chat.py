"""The form of OpenAI's chat completions. Reasoning has the field that vLLM and Dynamo give it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from dynamo_redis.frontend.choices import CompletionChoice, Part
from dynamo_redis.frontend.forms.base import Call, ChoiceEncoder, gathered
from dynamo_redis.frontend.forms.completions import ChunkEncoder, CompletionForm
from dynamo_redis.frontend.forms.detailed import chat_logprobs
from dynamo_redis.frontend.http.sse import ascii_json
from dynamo_redis.parsers.deltas import CallArguments, CallBegin, Delta, Reasoning, Text

_BEFORE: Final = b'"delta":{"content":'
_AFTER_DELTA: Final = b',"finish_reason":null,"logprobs":null}]}\n\n'
_AFTER: Final = b"}" + _AFTER_DELTA
_BEGIN: Final = b'"delta":{"role":"assistant","content":""}' + _AFTER_DELTA
_END: Final = b'"delta":{},"finish_reason":'


class ChatForm(CompletionForm):
    """A chat completion."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def content(self, choice: CompletionChoice) -> dict[str, Any]:
        """See `CompletionForm`."""
        sections = gathered(choice.parts)
        text = "".join(section.text for section in sections if isinstance(section, Text))
        reasoning = "".join(section.text for section in sections if isinstance(section, Reasoning))
        calls = [section for section in sections if isinstance(section, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls and not text:
            message["content"] = None
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls
            ]
        return {"message": message}

    def logprobs(self, choice: CompletionChoice) -> dict[str, Any]:
        """See `CompletionForm`."""
        return chat_logprobs(choice.answer.logprobs)

    def encoder(self, choice: CompletionChoice) -> ChoiceEncoder:
        """See `ResponseForm`."""
        encoder = PlainChatEncoder if choice.parser is None else ChatEncoder
        plain = encoder(self.chunk_start(choice.index), _BEFORE, _AFTER, _END)
        return self.detailed(plain, choice, chat_logprobs)


class ChatEncoder(ChunkEncoder):
    """Encodes the chunks of one choice of a chat."""

    __slots__ = ()

    def begin(self) -> bytes:
        """See `ChoiceEncoder`."""
        return self._start + _BEGIN

    def parts(self, parts: Sequence[Part]) -> bytes:
        """See `ChoiceEncoder`."""
        if parts and isinstance(parts[0], str):
            return self.texts(parts)  # type: ignore[arg-type]
        return b"".join(
            [
                self.texts([part.text])
                if isinstance(part, Text)
                else self.texts([part])
                if isinstance(part, str)
                else self._start + b'"delta":' + ascii_json(_delta(part)).encode() + _AFTER_DELTA
                for part in parts
            ]
        )


class PlainChatEncoder(ChatEncoder):
    """Encodes the chunks of a chat whose answer has no parser: all its parts are plain texts."""

    __slots__ = ()

    parts = ChunkEncoder.texts  # type: ignore[assignment]


def _delta(part: Delta) -> dict[str, Any]:
    """Return the `delta` of a part that is no content."""
    if isinstance(part, Reasoning):
        return {"reasoning_content": part.text}
    if isinstance(part, CallBegin):
        function = {"name": part.name, "arguments": ""}
        call = {"index": part.index, "id": part.id, "type": "function", "function": function}
        return {"tool_calls": [call]}
    assert isinstance(part, CallArguments)
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
