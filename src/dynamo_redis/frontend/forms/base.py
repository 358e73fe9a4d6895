"""The form of a response: how an API writes an answer whole, as events, and as an error.

Pure. An `Exchange` runs the choices of a request, and hands their parts to the form as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from dynamo_redis.frontend.choices import CompletionChoice, Part, Usage
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.parsers.deltas import CallArguments, CallBegin, Reasoning, Text


class ErrorForm(Protocol):
    """The errors of an API."""

    def response(self, error: ApiError, request_id: str) -> tuple[int, bytes]:
        """Return the HTTP status and the JSON body of an error."""
        ...


class ChoiceEncoder(Protocol):
    """Encodes the events of one choice of a stream."""

    def begin(self) -> bytes:
        """Return the events before the first part. Called once part of the answer has come."""
        ...

    def parts(self, parts: Sequence[Part]) -> bytes:
        """Return the events of the next parts of the answer, one event for each part."""
        ...

    def end(self, finish_reason: str) -> bytes:
        """Return the choice's last events, with the finish reason."""
        ...


class ResponseForm(Protocol):
    """The form of one response."""

    @property
    def model(self) -> str:
        """The name of the model that answers."""
        ...

    @property
    def errors(self) -> ErrorForm:
        """The form of its errors."""
        ...

    def whole(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes | list[str]:
        """Return the JSON body of a response that is sent whole; a long one in pieces, in ASCII."""
        ...

    def encoder(self, choice: CompletionChoice) -> ChoiceEncoder:
        """Return the encoder of a choice that is streamed."""
        ...

    def end(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """Return the events that end a stream, after those of all choices."""
        ...

    def failure(self, error: ApiError, request_id: str) -> bytes:
        """Return the events of an error that ends a stream."""
        ...


class Call(NamedTuple):
    """A whole tool call."""

    id: str
    name: str
    arguments: str


def gathered(parts: Iterable[Part]) -> list[Text | Reasoning | Call]:
    """Return the sections of an answer, in order. A section joins the parts of one sort that follow each
    other."""
    sections: list[tuple[type[Text | Reasoning] | CallBegin, list[str]]] = []
    for part in parts:
        if isinstance(part, CallBegin):
            sections.append((part, []))
            continue
        if isinstance(part, CallArguments):
            sections[-1][1].append(part.text)
            continue
        sort = Reasoning if isinstance(part, Reasoning) else Text
        if not sections or sections[-1][0] is not sort:
            sections.append((sort, []))
        sections[-1][1].append(part if isinstance(part, str) else part.text)
    return [
        Call(sort.id, sort.name, "".join(texts)) if isinstance(sort, CallBegin) else sort("".join(texts))
        for sort, texts in sections
    ]
