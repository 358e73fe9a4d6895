"""Response items, with fields for an event and comments beside the data."""

from __future__ import annotations

from typing import Any


class Annotated:
    """One item of a response, as callers of `dynamo.runtime` expect it."""

    __slots__ = ("_comments", "_data", "_event", "_id")

    def __init__(
        self,
        data: Any = None,
        event: str | None = None,
        comments: list[str] | None = None,
        id: str | None = None,  # noqa: A002 - the name users of dynamo.runtime know
    ) -> None:
        self._data = data
        self._event = event
        self._comments = comments
        self._id = id

    def data(self) -> Any:
        """The item itself."""
        return self._data

    def event(self) -> str | None:
        """The event's name; None for ordinary items."""
        return self._event

    def comments(self) -> list[str] | None:
        """Comments that came with the item; None without any."""
        return self._comments

    def id(self) -> str | None:
        """The item's own id, if it has one."""
        return self._id

    def is_error(self) -> bool:
        """Return whether this is an error event. Always False here, since errors of a request are raised."""
        return self._event == "error"

    def __repr__(self) -> str:
        event = f", event={self._event!r}" if self._event else ""
        return f"Annotated({self._data!r}{event})"
