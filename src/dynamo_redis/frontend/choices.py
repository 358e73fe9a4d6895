"""One choice of a completion: its request, and the part of the answer that has arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dynamo_redis.frontend.answers import AnswerDecoder
from dynamo_redis.frontend.migration import Migration
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.parsers.answer_parser import PIECE_SIZE
from dynamo_redis.parsers.deltas import Delta
from dynamo_redis.planes.context import Context

Part = str | Delta
"""A part of an answer. A plain text is content. Of parts that come together, all are texts, or none is."""


class AnswerParser(Protocol):
    """Finds reasoning and tool calls in the text of one answer."""

    @property
    def has_calls(self) -> bool:
        """True once the model has called a tool."""
        ...

    def passes(self, texts: list[str]) -> bool:
        """Return whether these texts are content as they are, and need not be fed."""
        ...

    def feed(self, text: str) -> list[Delta]:
        """Return the parts that a further text completes."""
        ...

    def finish(self, *, is_cut: bool = False) -> list[Delta]:
        """Return the last parts, after the last text. `is_cut`: the answer goes no further because of a
        limit."""
        ...


class CompletionChoice:
    """One choice of a completion: its request, and the part of the answer that has arrived."""

    __slots__ = (
        "_make_parser",
        "answer",
        "begun",
        "context",
        "first_item_at",
        "index",
        "instance_id",
        "item_at",
        "migration",
        "parser",
        "parts",
        "request",
    )

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        answer: AnswerDecoder,
        context: Context,
        migration: Migration | None = None,
        make_parser: Callable[[], AnswerParser] | None = None,
    ) -> None:
        """`migration` has the answer go on at another worker if its worker is lost; None: it ends then.

        `make_parser` makes the parser of the answer, at its beginning; None: the answer is plain text.
        """
        self.index = index
        self.request = request
        self.answer = answer
        self.context = context
        self.migration = migration
        self.begun = False
        """True once part of the answer has arrived."""
        self.instance_id: int | None = None
        """The worker that has answered last."""
        self.first_item_at = 0.0
        self.item_at = 0.0
        """The time of its last item, on `time.perf_counter`."""
        self.parts: list[Part] = []
        """The parts so far of an answer that is sent whole."""
        self._make_parser = make_parser
        self.parser = None if make_parser is None else make_parser()

    def parsed(self, texts: list[str]) -> Sequence[Part]:
        """Return the parts that the next texts of the answer complete.

        Parsing takes a time in proportion to the texts: long ones are for `parsed_in_pieces`.
        """
        is_over = self.answer.finish_reason is not None
        if is_over and not texts[-1]:
            texts.pop()
        if self.parser is None or (not is_over and self.parser.passes(texts)):
            return texts
        deltas = [delta for text in texts for delta in self.parser.feed(text)]
        if is_over:
            deltas += self.parser.finish(is_cut=self.answer.finish_reason != "stop")
        return deltas

    def parsed_in_pieces(self, texts: list[str]) -> Iterator[Sequence[Delta]]:
        """Return the parts, as `parsed` does, in steps between which the event loop may turn."""
        assert self.parser is not None
        text = "".join(texts)
        for at in range(0, len(text), PIECE_SIZE):
            yield self.parser.feed(text[at : at + PIECE_SIZE])
        if self.answer.finish_reason is not None:
            yield self.parser.finish(is_cut=self.answer.finish_reason != "stop")

    @property
    def finish_reason(self) -> str | None:
        """The finish reason; `tool_calls` if the model has ended its answer by calling tools."""
        reason = self.answer.finish_reason
        return "tool_calls" if reason == "stop" and self.parser and self.parser.has_calls else reason

    def restart(self) -> None:
        """Forget the answer so far: another worker answers from the beginning."""
        self.begun = False
        self.parts.clear()
        self.answer.restart()
        if self.migration is not None:
            self.migration.restart()
        self.parser = None if self._make_parser is None else self._make_parser()


@dataclass(frozen=True, slots=True)
class Usage:
    """The counts of tokens of all choices."""

    prompt_count: int
    answer_count: int
    cached_count: int | None
    """Tokens of the prompts that the workers had in their caches; None if none of them counted."""
    reasoning_count: int | None = None
    """Tokens of the answers' reasoning; None if they are not told apart."""

    @classmethod
    def of(cls, choices: Iterable[CompletionChoice]) -> Usage:
        """Count the tokens so far.

        Each prompt counts once, by its first choice, however many choices share its list of tokens: later
        choices find cached tokens that the first one has put there.
        """
        answers = 0
        reasoning_count: int | None = None
        prompts: dict[int, tuple[int, int | None]] = {}  # id of the list → its tokens, the cached ones
        for choice in choices:
            token_ids, answer = choice.request["token_ids"], choice.answer
            answers += answer.token_count
            if answer.reasoning_count is not None:
                reasoning_count = (reasoning_count or 0) + answer.reasoning_count
            count = answer.prompt_token_count or len(token_ids)
            cached_count = None if answer.cached_tokens is None else min(answer.cached_tokens, count)
            prompts.setdefault(id(token_ids), (count, cached_count))
        cached = [count for _, count in prompts.values() if count is not None]
        return cls(
            sum(count for count, _ in prompts.values()),
            answers,
            sum(cached) if cached else None,
            reasoning_count,
        )
