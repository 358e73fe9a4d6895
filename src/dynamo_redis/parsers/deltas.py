"""The parts of an answer, in the order in which a client gets them.

They are not frozen, since a frozen dataclass takes three times as long to make, and one is made for each
token. Treat them as constants all the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Text:
    """A further part of the answer's content."""

    text: str


@dataclass(slots=True)
class Reasoning:
    """A further part of the model's reasoning."""

    text: str


@dataclass(slots=True)
class CallBegin:
    """The beginning of a tool call. Its arguments follow, before the next call begins."""

    index: int
    """The number of the call in its answer, from 0."""
    id: str
    name: str


@dataclass(slots=True)
class CallArguments:
    """A further part of a call's arguments: JSON text, which is an object once the call has ended."""

    index: int
    """The number of the call in its answer."""
    text: str


Delta = Text | Reasoning | CallBegin | CallArguments
