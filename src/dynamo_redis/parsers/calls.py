"""The calls that a tool format finds in an answer, on their way to the client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dynamo_redis.parsers.deltas import CallArguments, CallBegin, Delta, Reasoning, Text
from dynamo_redis.parsers.reader import Malformed, Reader, Steps

LONGEST_NAME: Final = 256
"""The longest name of a function, of a parameter, or of another key, in characters."""


class Calls:
    """Takes the parts of an answer, and makes deltas of them.

    With `streams` the parts of a call are deltas as they come. Otherwise a call is withheld until it is
    complete, so that one that turns out to be malformed is part of the text instead.
    """

    def __init__(
        self,
        reader: Reader,
        tools: Mapping[str, Mapping[str, Any]],
        new_id: Callable[[], str],
        *,
        most_calls: int | None,
        streams: bool,
    ) -> None:
        """`tools` are the JSON schemas of the functions' parameters. Calls after `most_calls` are left
        out."""
        self._reader = reader
        self._new_id = new_id
        self._most_calls = most_calls
        self._streams = streams
        self._withheld: list[Delta] = []
        self._index = -1
        self.tools = tools
        self.only_tools = False
        """True while a text without a marker is read: it is a call only of a known function."""
        self.is_open = False
        """True while a call is under way."""
        self.count = 0
        """The number of complete calls."""
        self.out: list[Delta] = []

    def begin(self, name: str, call_id: str | None = None) -> None:
        """Begin a call. Raises Malformed if there cannot be one of this name."""
        if name.split() != [name] or (self.only_tools and name not in self.tools):
            raise Malformed
        if any("\ud800" <= character <= "\udfff" for character in name):  # it has no form in UTF-8
            raise Malformed
        self.is_open = True
        self._index += 1
        self._add(CallBegin(self._index, call_id or self._new_id(), name))

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call under way."""
        self._add(CallArguments(self._index, text))

    def end(self) -> None:
        """End the call under way."""
        self.out += self._withheld
        self._withheld = []
        self.is_open = False
        self.count += 1
        self._reader.drop()

    def cut(self) -> None:
        """Give the call under way as far as it has come: the answer was cut off in it."""
        self.out += self._withheld
        self._withheld = []
        self.is_open = False

    def abandon(self) -> None:
        """Give up the call under way. If it was withheld, there has been none."""
        if not self._streams:
            self._withheld = []
            self._index -= 1
        self.is_open = False

    def text(self, text: str) -> None:
        """Add to the content."""
        if text:
            _append(self.out, Text(text))
        self._reader.drop()

    def reasoning(self, text: str) -> None:
        """Add to the reasoning."""
        _append(self.out, Reasoning(text))
        self._reader.drop()

    def _add(self, delta: Delta) -> None:
        if self._most_calls is None or self._index < self._most_calls:
            if self._streams:
                _append(self.out, delta)
            else:
                self._withheld.append(delta)
        if self._streams:
            self._reader.drop()


def _append(deltas: list[Delta], delta: Delta) -> None:
    """Append a delta, or its text to a last one of its kind."""
    last = deltas[-1] if deltas else None
    if type(last) is type(delta) and not isinstance(delta, CallBegin):
        last.text += delta.text  # type: ignore[union-attr]
    else:
        deltas.append(delta)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes tool calls."""

    begin: tuple[str, ...]
    """The markers with which calls begin."""
    read: Callable[[Reader, Calls, str], Steps[None]]
    """Reads the calls after one of these markers, or after "" at the beginning of an answer. Raises
    Malformed."""
    bare: str = ""
    """The characters with which an answer begins that is calls without a marker."""
    markers: tuple[str, ...] = ()
    """The further literals, which are tokens of their own in some tokenizers."""
    is_bound: bool = False
    """True if the answer is bound to be a call: one that begins so has no reasoning."""
    short_ids: bool = False
    """True if the model's template takes ids of nine letters and digits only."""
