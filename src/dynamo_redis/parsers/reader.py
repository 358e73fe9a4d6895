"""A text that arrives in pieces, read by generators as if it were whole.

A step of a parser is a generator: it yields when it needs more text, and is resumed once some has arrived or
the text has ended. No step looks at where a piece ends, so the result is the same for all pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import Final, TypeVar

from dynamo_redis.parsers.deltas import Delta

T = TypeVar("T")
Steps = Generator[None, None, T]

MOST_SKIPPED: Final = 1 << 14
"""Most characters that are skipped at once, since they are held until it is clear what they belong to."""

_SPACE: Final = re.compile(r"\s*")

_LEAST_OF_MARKER: Final = 2
"""The fewest characters at the end of a cut text that are taken for the beginning of a marker. One alone,
such as "<", is more often text."""


class Malformed(Exception):
    """The text from here on is not in the format. The reader's position is where it breaks the format."""


class CutOff(Malformed):
    """The text is in the format, as far as it goes: it has ended too early."""


class Reader:
    """The part of a text that has arrived and is still needed."""

    __slots__ = ("buffer", "ended", "first", "gate", "is_cut", "makes", "mark", "position", "start")

    def __init__(self) -> None:
        self.buffer = ""
        self.position = 0
        """The index in `buffer` of the next character to read."""
        self.mark = 0
        """The index of the first character that is neither given to the client nor dropped."""
        self.start = 0
        """The index of the first character of a value that is not yet given."""
        self.ended = False
        """True once no further text comes."""
        self.is_cut = False
        """True if the text has ended at a limit, perhaps within a marker."""
        self.makes: Callable[[str], Delta] | None = None
        """Makes the delta of further text, while that contains no character of the gate."""
        self.first = ""
        """The one character of the gate; empty if it has none, or several."""
        self.gate: Callable[[str], object] = _nothing
        """Returns something else than None for a text in which a marker may begin."""

    def feed(self, text: str) -> None:
        """Append a piece."""
        self.buffer = self.buffer[self.mark :] + text
        self.position -= self.mark
        self.start -= self.mark
        self.mark = 0

    def drop(self) -> None:
        """Leave out the text from the mark to the position: it is part of the format."""
        self.mark = self.position

    # ----------------------------------------------------------------- steps

    def more(self) -> Steps[None]:
        """Wait for more text. Raises CutOff if it has ended."""
        if self.ended:
            raise CutOff
        yield

    def peek(self) -> Steps[str]:
        """Return the next character, or "" at the end."""
        while self.position == len(self.buffer) and not self.ended:
            yield
        return self.buffer[self.position : self.position + 1]

    def skip(self, pattern: re.Pattern[str]) -> Steps[None]:
        """Read past what matches a pattern of one character, repeated: `MOST_SKIPPED` characters at most."""
        left = MOST_SKIPPED
        while True:
            match = pattern.match(self.buffer, self.position, self.position + left)
            assert match is not None
            left -= match.end() - self.position
            self.position = match.end()
            if not left or self.position < len(self.buffer) or self.ended:
                return
            yield

    def skip_space(self) -> Steps[None]:
        """Read past white space."""
        return self.skip(_SPACE)

    def optional(self, literal: str) -> Steps[bool]:
        """Read past a literal if it comes next. Return whether it did.

        Raises CutOff where the text is cut off within the literal.
        """
        while not self.buffer.startswith(literal, self.position):
            rest = self.buffer[self.position :]
            if not literal.startswith(rest):
                return False
            if self.ended:
                if rest and self.is_cut:
                    raise CutOff
                return False
            yield
        self.position += len(literal)
        return True

    def close(self, literal: str) -> Steps[bool]:
        """Leave out a literal and the text between mark and position; or go back to the mark, if another text
        comes next. Return whether it came. Where the text is cut off within the literal, it has come."""
        try:
            has_come = yield from self.optional(literal)
        except CutOff:
            has_come = True
            self.position = len(self.buffer)
        if has_come:
            self.drop()
        else:
            self.position = self.mark
        return has_come

    def expect(self, literal: str) -> Steps[None]:
        """Read past a literal. Raises Malformed if another text comes next."""
        yield from self.one_of(literal)

    def one_of(self, *literals: str) -> Steps[str]:
        """Read past that of some literals which comes next, and return it. Raises Malformed if none does."""
        for literal in literals:
            if (yield from self.optional(literal)):
                return literal
        rest = self.buffer[self.position :]
        raise CutOff if any(literal.startswith(rest) for literal in literals) else Malformed

    def until(self, ends: tuple[str, ...], limit: int) -> Steps[tuple[str, str]]:
        """Return the text before the first of several ends, and the end, which is read.

        Raises Malformed if there are more than `limit` characters before it.
        """
        search, _, _ = _compile(ends)
        longest = max(map(len, ends))
        searched = 0
        """The characters behind the position with which no end begins."""
        while True:
            found = search(self.buffer, self.position + searched, self.position + limit + longest)
            if found is not None and found.start() - self.position <= limit:
                text = self.buffer[self.position : found.start()]
                self.position = found.end()
                return text, found.group()
            size = len(self.buffer) - self.position
            if size >= limit + longest:
                raise Malformed
            searched = max(0, size - longest + 1)
            yield from self.more()

    def pass_until(
        self,
        ends: tuple[str, ...],
        give: Callable[[str], None],
        *,
        makes: Callable[[str], Delta] | None = None,
        withheld: bool = False,
        expects: bool = True,
    ) -> Steps[str | None]:
        """Give the text before the first of several ends, as it comes. Return the end, which is read; None if
        the text has ended.

        `give` moves the mark, if it gives the text to the client. `makes` does what `give` does for text with
        no beginning of an end, without the reader. With `withheld`, the text between mark and
        position is white space that is given before other text, and left out before an end. Where the text
        is cut off in an end that the format `expects`, its beginning is left out.
        """
        search, gate, first = _compile(ends)
        start = 0 if withheld else self.position - self.mark
        while True:
            size = len(self.buffer)
            found = search(self.buffer, self.position)
            is_last = found is None and self.ended
            if found is not None:
                stop = found.start()
            elif is_last and not (self.is_cut and expects):
                stop = size
            else:
                stop = _partial_end(self.buffer, self.position, ends)
                if is_last and size - stop < _LEAST_OF_MARKER:
                    stop = size
            if stop > self.position or (is_last and size == stop > self.mark + start):
                self.position = stop
                give(self.buffer[self.mark + start : stop])
                start = self.position - self.mark
            if found is not None:
                self.position = found.end()
                return found.group()
            if is_last:
                if stop < size:
                    self.position = size
                    self.drop()
                return None
            if self.mark == size:
                self.makes, self.gate, self.first = makes, gate, first
            yield
            self.makes = None


def _nothing(_: str) -> None:
    """Find nothing."""


@lru_cache(maxsize=256)
def _compile(
    ends: tuple[str, ...],
) -> tuple[Callable[..., re.Match[str] | None], Callable[[str], object], str]:
    """Return the search for any of some literals, that for a character with which one begins, and this
    character if there is one only."""
    if not ends:
        return re.compile("(?!)").search, _nothing, ""
    first = "".join(sorted({end[0] for end in ends}))
    return (
        re.compile("|".join(re.escape(end) for end in ends)).search,
        re.compile(f"[{re.escape(first)}]").search,
        first if len(first) == 1 else "",
    )


def _partial_end(text: str, start: int, ends: Iterable[str]) -> int:
    """Return the index at which the text's own end may be the beginning of one of these; else its length."""
    kept = len(text)
    for end in ends:
        for at in range(max(start, len(text) - len(end) + 1), kept):
            if end.startswith(text[at:]):
                kept = at
                break
    return kept
