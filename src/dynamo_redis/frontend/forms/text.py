"""The form of OpenAI's text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from dynamo_redis.frontend.choices import CompletionChoice, Part
from dynamo_redis.frontend.forms.base import ChoiceEncoder
from dynamo_redis.frontend.forms.completions import ChunkEncoder, CompletionForm
from dynamo_redis.frontend.forms.detailed import TextLogprobs

_BEFORE: Final = b'"text":'
_AFTER: Final = b',"finish_reason":null,"logprobs":null}]}\n\n'
_END: Final = b'"text":"","finish_reason":'


class TextForm(CompletionForm):
    """A text completion."""

    id_prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def content(self, choice: CompletionChoice) -> dict[str, Any]:
        """See `CompletionForm`."""
        return {"text": "".join(_texts(choice.parts))}

    def logprobs(self, choice: CompletionChoice) -> dict[str, Any]:
        """See `CompletionForm`."""
        return TextLogprobs()(choice.answer.logprobs)

    def encoder(self, choice: CompletionChoice) -> ChoiceEncoder:
        """See `ResponseForm`."""
        plain = TextEncoder(self.chunk_start(choice.index), _BEFORE, _AFTER, _END)
        return self.detailed(plain, choice, TextLogprobs())


class TextEncoder(ChunkEncoder):
    """Encodes the chunks of one choice of a text completion."""

    __slots__ = ()

    def begin(self) -> bytes:
        """See `ChoiceEncoder`."""
        return b""

    def parts(self, parts: Sequence[Part]) -> bytes:
        """See `ChoiceEncoder`."""
        return self.texts(_texts(parts))


def _texts(parts: Sequence[Part]) -> Sequence[str]:
    """Return the parts, which are plain texts: text completions have no parser."""
    assert not parts or isinstance(parts[0], str)
    return parts  # type: ignore[return-value]
