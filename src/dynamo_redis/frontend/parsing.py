"""The parsers of a model's answers, and those that a request needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from dynamo_redis.frontend.openai import ChatBody
from dynamo_redis.frontend.options import CompletionOptions
from dynamo_redis.frontend.reasoning_tokens import ReasoningTokens
from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.frontend.tool_choice import chosen_name, must_call
from dynamo_redis.models.card import ModelCard
from dynamo_redis.parsers.answer_parser import AnswerParser
from dynamo_redis.parsers.calls import ToolFormat
from dynamo_redis.parsers.json_calls import chosen_format
from dynamo_redis.parsers.reasoning import ReasoningFormat
from dynamo_redis.parsers.select import marker_texts, reasoning_format, tool_format

log = logging.getLogger(__name__)

_PROMPT_END_TOKENS: Final = 8
"""The tokens at the end of a prompt in which a marker of reasoning is looked for."""


@dataclass(frozen=True, slots=True)
class RequestParsing:
    """The parsers of the answers to one request."""

    tool: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    tools: Mapping[str, Mapping[str, Any]] | None = None
    most_calls: int | None = None
    streams: bool = False
    shown: frozenset[str] = frozenset()
    """The names of special tokens whose text the parsers need."""

    def maker(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> Callable[[], AnswerParser] | None:
        """Return the function that makes the parser of an answer; None if it is plain text."""
        if self.tool is None and self.reasoning is None:
            return None
        return partial(
            AnswerParser,
            self.tool,
            self.reasoning,
            starts_inside=self._starts_inside(tokenizer, prompt),
            tools=self.tools,
            most_calls=self.most_calls,
            streams=self.streams,
        )

    def counter(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> ReasoningTokens | None:
        """Return the counter of an answer's reasoning; None if the answer has none."""
        if self.reasoning is None:
            return None
        return ReasoningTokens(
            self.reasoning,
            tokenizer.shown_bytes(self.shown),
            starts_inside=self._starts_inside(tokenizer, prompt),
            other="".join(self.tool.bare) if self.tool is not None and self.tool.is_bound else "",
        )

    def _starts_inside(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
        """Return whether an answer begins with reasoning, without its marker."""
        if self.reasoning is None:
            return False
        end = tokenizer.decode(prompt[-_PROMPT_END_TOKENS:], skip_special_tokens=False)
        return self.reasoning.begins_inside(end)


_PLAIN: Final = RequestParsing()
"""The answers are plain text."""


@dataclass(frozen=True, slots=True)
class Parsing:
    """The formats of tool calls and reasoning in a model's answers; None: the model has none."""

    tool: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None

    @classmethod
    def of(cls, card: ModelCard, templates: Mapping[str, str]) -> Parsing:
        """Return the formats that the card names, or that fit the chat templates.

        Names that are not known here are logged: such answers are plain text.
        """
        template = "\n".join(templates.values())
        tool: ToolFormat | None = None
        reasoning: ReasoningFormat | None = None
        config = card.runtime_config
        try:
            tool = tool_format(config.tool_call_parser, template)
        except KeyError:
            _log_unknown(card, "tool_call_parser", config.tool_call_parser)
        try:
            reasoning = reasoning_format(config.reasoning_parser, template)
        except KeyError:
            _log_unknown(card, "reasoning_parser", config.reasoning_parser)
        return cls(tool, reasoning)

    def of_request(self, body: CompletionOptions) -> RequestParsing:
        """Return the parsers for the answers to a body."""
        if not isinstance(body, ChatBody):
            return _PLAIN
        has_tools = bool(body.tools) and body.tool_choice != "none"
        tool = self.tool if has_tools else None
        if has_tools and must_call(body.tool_choice):
            tool = chosen_format(self.tool, chosen_name(body.tool_choice))
        reasoning = None if body.separate_reasoning is False else self.reasoning
        if tool is None and reasoning is None:
            return _PLAIN
        is_one = body.parallel_tool_calls is False or chosen_name(body.tool_choice) is not None
        return RequestParsing(
            tool,
            reasoning,
            {each["function"]["name"]: _schema(each["function"]) for each in body.tools or ()},
            1 if is_one else None,
            bool(body.stream),
            marker_texts(tool, reasoning),
        )


PLAIN: Final = Parsing()
"""The model has no tool calls and no reasoning."""


def _schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    return parameters if isinstance(parameters, Mapping) else {}


def _log_unknown(card: ModelCard, field: str, name: str | None) -> None:
    log.warning(
        "model %r: its card's %s=%r is not known here; its answers are sent as plain text",
        card.display_name,
        field,
        name,
    )
