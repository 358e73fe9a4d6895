"""Messages to and from the process that renders chat templates, and the limits of one rendering."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

RENDER_LIMIT_S: Final = 5.0
"""Longest time of a rendering in its process, in seconds."""

OUTPUT_LIMIT_CHARS: Final = 64 << 20
"""Longest output of a template, in characters; far above any prompt that fits a request body."""


class RenderLimits(NamedTuple):
    """The limits of one rendering."""

    time_s: float
    """Elapsed time. A template is stopped at its next operation or output after it."""
    memory_bytes: int
    """Size of all texts and lists that it makes, including those no longer used."""


RENDER_LIMITS: Final = RenderLimits(RENDER_LIMIT_S, 1 << 30)

PROBE_LIMIT_S: Final = 1.0
PROBE_LIMITS: Final = RenderLimits(PROBE_LIMIT_S, 64 << 20)
"""For the test renderings of one short message, when a model is loaded."""

PROCESS_MEMORY_BYTES: Final = 256 << 20
"""Most memory of a rendering process, in addition to its code."""

DONE: Final = b"+"
"""Prefix of a rendered text."""

MASKED: Final = b"="
"""Prefix of a mask, `MASK_BYTES` long, and a rendered text with it: see `masking.py`."""

MASK_BYTES: Final = 3

REFUSED: Final = b"-"
"""Prefix of the reason why there is no text."""


@dataclass(frozen=True, slots=True)
class MaskedText:
    """A prompt's text in UTF-8. A mask stands in each name of a special token that a client wrote."""

    text: bytearray
    mask: str

    def __len__(self) -> int:
        return len(self.text)


def render_job(
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the job to render a conversation, with the arguments of `CompiledTemplates.render`.

    `variables` are further variables of the template (`enable_thinking`).
    """
    return to_json(
        {
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
    )


_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value: Any) -> bytes:
    """Return a value as JSON for the process. Lone surrogates are kept."""
    return _compact(value).encode(errors="surrogatepass")
