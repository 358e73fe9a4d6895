"""Messages to and from the process that renders chat templates, and the limits of one rendering."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

RENDER_LIMIT_S: Final = 5.0
"""A template that runs for longer is stopped: at its next operation or output."""

PROBE_LIMIT_S: Final = 1.0
"""The same for the trial renderings of one short message, when a model is loaded."""

OUTPUT_LIMIT_CHARS: Final = 64 << 20
"""A template that writes more is stopped; far above any prompt that fits a body."""

MEMORY_LIMIT_BYTES: Final = 1 << 30
"""All that the texts and lists made by one rendering may take together, those given up included."""

PROBE_MEMORY_LIMIT_BYTES: Final = 64 << 20

PROCESS_MEMORY_BYTES: Final = 256 << 20
"""Most memory of a process that renders, beside its code."""

DONE: Final = b"+"
"""Before the text that was rendered."""

REFUSED: Final = b"-"
"""Before the reason why there is none."""


def render_job(
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> bytes:
    """The job of rendering a conversation, with the arguments of `CompiledTemplates.render`.

    `variables` are what the template may ask for beyond these (`enable_thinking`).
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


def to_json(value: Any) -> bytes:
    """A job of the process. Half characters stay what they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
