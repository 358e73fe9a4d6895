"""Parses an answer's text, in any pieces, into content, reasoning and tool calls."""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

from dynamo_redis.parsers.calls import Calls, ToolFormat
from dynamo_redis.parsers.deltas import Delta, Reasoning, Text
from dynamo_redis.parsers.reader import CutOff, Malformed, Reader, Steps
from dynamo_redis.parsers.reasoning import ReasoningFormat

_MOST_READ_AGAIN: Final = 1024
"""The longest malformed text, in characters, in which calls are looked for once more."""

PIECE_SIZE: Final = 2048
"""A text of more characters is to be fed in pieces, with turns of the event loop between them."""

_ALPHABET: Final = string.ascii_letters + string.digits


class AnswerParser:
    """Parses one answer.

    All of the text is in the deltas, once and in order, except for markers and the white space around them.
    What begins like a call and is none is content. A call in which the answer was cut off is given as far as
    it has come, as whole members and pieces of text; behind another call, what has no arguments yet is left
    out. A marker in which reasoning was cut off, or which follows a call, is left out like a whole one.
    """

    __slots__ = (
        "_calls",
        "_reader",
        "_reasoning",
        "_starts_inside",
        "_steps",
        "_streams",
        "_tool",
        "_unread",
        "_unread_size",
    )

    def __init__(
        self,
        tool: ToolFormat | None = None,
        reasoning: ReasoningFormat | None = None,
        *,
        starts_inside: bool = False,
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        most_calls: int | None = None,
        streams: bool = True,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        """Parse calls in the format `tool`, and reasoning in the format `reasoning`; None: there are none.

        `starts_inside` says that the answer begins with reasoning, without its marker. `tools` are the JSON
        schemas of the parameters of the functions that may be called. Calls after `most_calls` are left out.
        Without `streams` a call that is malformed has never begun, and texts are parsed once they are long.
        """
        self._tool = tool
        self._reasoning = reasoning
        self._starts_inside = starts_inside
        self._reader = Reader()
        self._streams = streams
        self._unread: list[str] = []
        self._unread_size = 0
        if new_id is None:
            new_id = _short_id if tool is not None and tool.short_ids else _long_id
        self._calls = Calls(self._reader, tools or {}, new_id, most_calls=most_calls, streams=streams)
        self._steps = self._run()
        next(self._steps)

    @property
    def has_calls(self) -> bool:
        """True once a call is complete."""
        return self._calls.count > 0

    def passes(self, texts: list[str]) -> bool:
        """Return whether these texts are content as they are, so that there is no need to feed them."""
        reader = self._reader
        if reader.makes is not Text or not self._streams:
            return False
        if reader.first and len(texts) == 1:  # faster than the gate
            return reader.first not in texts[0]
        return all(reader.gate(text) is None for text in texts)

    def feed(self, text: str) -> list[Delta]:
        """Return the deltas that a piece of the answer completes. A piece of up to `PIECE_SIZE` characters
        takes a few milliseconds, and up to some 15 ms where a long value ends that was withheld."""
        if not self._streams:  # calls are withheld, so that a step for each token would cost too much
            self._unread.append(text)
            self._unread_size += len(text)
            if self._unread_size < PIECE_SIZE:
                return []
            text = self._take_unread()
        reader = self._reader
        if (makes := reader.makes) is not None and text and reader.gate(text) is None:
            return [makes(text)]
        out: list[Delta] = []
        self._calls.out = out
        reader.feed(text)
        self._steps.send(None)
        return out

    def finish(self, *, is_cut: bool = False) -> list[Delta]:
        """Return the last deltas, at the end of the answer. `is_cut`: the model had not ended it."""
        self._reader.is_cut = is_cut
        out: list[Delta] = []
        self._calls.out = out
        if self._unread:
            self._reader.feed(self._take_unread())
        self._reader.ended = True
        for _ in self._steps:
            pass
        return out

    def _take_unread(self) -> str:
        text = "".join(self._unread)
        self._unread.clear()
        self._unread_size = 0
        return text

    # ----------------------------------------------------------------- steps

    def _run(self) -> Steps[None]:
        reader, calls, tool = self._reader, self._calls, self._tool
        yield
        is_call = False
        if tool is not None and tool.is_bound:
            yield from reader.skip_space()
            character = yield from reader.peek()
            is_call = bool(character) and character in tool.bare
            reader.position = reader.mark
        if self._reasoning is not None and not is_call:
            yield from self._read_reasoning(self._reasoning)
        if tool is None:
            yield from reader.pass_until((), calls.text, makes=Text, withheld=True)
            return
        yield from reader.skip_space()
        if (character := (yield from reader.peek())) and character in tool.bare:
            calls.only_tools = True
            yield from self._read_calls(tool, "")
            calls.only_tools = False
        while True:
            marker = yield from reader.pass_until(
                tool.begin, calls.text, makes=Text, withheld=True, expects=calls.count > 0
            )
            if marker is None:
                return
            yield from self._read_calls(tool, marker)

    def _read_reasoning(self, markers: ReasoningFormat) -> Steps[None]:
        reader = self._reader
        yield from reader.skip_space()
        if not (yield from reader.close(markers.begin)) and not self._starts_inside:
            return
        yield from reader.skip_space()
        reader.drop()
        give = self._calls.reasoning
        if (yield from reader.pass_until((markers.end,), give, makes=Reasoning)) is not None:
            yield from reader.skip_space()
            reader.drop()

    def _read_calls(self, tool: ToolFormat, marker: str) -> Steps[None]:
        """Read calls after a marker, and then white space. Give a text that is malformed as content."""
        reader, calls, count = self._reader, self._calls, self._calls.count
        start = reader.position - reader.mark
        try:
            yield from tool.read(reader, calls, marker)
        except Malformed as exc:
            if (calls.is_open or calls.count) and reader.is_cut and isinstance(exc, CutOff):
                calls.cut()
                reader.position = len(reader.buffer)
                reader.drop()
                return
            if calls.is_open:
                calls.abandon()
            elif calls.count == count and reader.position - reader.mark <= _MOST_READ_AGAIN:
                # The text after the marker may have calls, too.
                reader.position = reader.mark + start + (not marker)
            calls.text(reader.buffer[reader.mark : reader.position])
        yield from reader.skip_space()
        if calls.count and not (yield from reader.peek()):
            reader.drop()


def _long_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def _short_id() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))
