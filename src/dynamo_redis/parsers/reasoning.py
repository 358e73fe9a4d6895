"""The markers between which families of models write their reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """A family's markers.

    Reasoning is at the beginning of an answer only: an answer may write of these markers later.
    """

    begin: str
    end: str
    starts_inside: bool = False
    """True if an answer begins with reasoning, with or without the marker."""

    def begins_inside(self, prompt_end: str) -> bool:
        """Return whether an answer begins with reasoning, from the end of its prompt: many chat templates
        write one of the markers there."""
        stripped = prompt_end.rstrip()
        if stripped.endswith(self.begin):
            return True
        return self.starts_inside and not stripped.endswith(self.end)


_THINK: Final = ReasoningFormat("<think>", "</think>")
_INSIDE: Final = ReasoningFormat("<think>", "</think>", starts_inside=True)

REASONING_FORMATS: Final[dict[str, ReasoningFormat]] = {
    "basic": _THINK,
    "deepseek_r1": _INSIDE,
    "deepseek_v3": _THINK,
    "deepseek_v3_1": _THINK,
    "glm45": _THINK,
    "glm47": _THINK,
    "granite": ReasoningFormat("Here is my thought process:", "Here is my response:"),
    "kimi": ReasoningFormat("◁think▷", "◁/think▷"),
    "kimi_k2": _THINK,
    "kimi_k25": _INSIDE,
    "minimax_m2": _INSIDE,
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "nemotron3": _INSIDE,
    "nemotron_deci": _THINK,
    "nemotron_nano": _INSIDE,
    "nemotron_v3": _INSIDE,
    "qwen3": _THINK,
    "qwen3_coder": _THINK,
    "step3": _INSIDE,
}
"""The formats by Dynamo's names."""
