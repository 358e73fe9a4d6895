"""How many entries of a stream to ask for, so that an answer has about so many bytes. Pure."""

from __future__ import annotations

from typing import Final

PAGE_BYTES: Final = 1 << 20
FIRST_COUNT: Final = 16
GROWTH: Final = 4


class PageSize:
    """The count of the next page of one reader, by what its last page came to.

    Redis ends a page of a stream after a number of entries, however large they are. While nothing is known of
    them it is `FIRST_COUNT`. Then as many as `page_bytes` hold, if they are like those of the last page; at
    most `GROWTH` times as many as before, and `most_count`. After a failure it is one: a page that did not
    come within its deadline may have been too large for the link.
    """

    def __init__(self, most_count: int, *, page_bytes: int = PAGE_BYTES) -> None:
        self.count = min(FIRST_COUNT, most_count)
        self._most_count = most_count
        self._page_bytes = page_bytes

    def took(self, entry_count: int, size_bytes: int) -> None:
        """A page came, with so many entries and bytes."""
        fit_count = self._page_bytes * entry_count // max(1, size_bytes)
        self.count = max(1, min(fit_count, GROWTH * self.count, self._most_count))

    def failed(self) -> None:
        """A page did not come."""
        self.count = 1
