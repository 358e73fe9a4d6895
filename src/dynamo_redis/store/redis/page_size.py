"""The number of stream entries to ask for, so that an answer has about a given size. Pure."""

from __future__ import annotations

from typing import Final

PAGE_BYTES: Final = 1 << 20
FIRST_COUNT: Final = 16
GROWTH: Final = 4


class PageSize:
    """The count of the next page of one reader, computed from the size of its last page.

    Redis ends a page of a stream after a number of entries of any size. The first page has `FIRST_COUNT`.
    Each further page has as many entries as fit `page_bytes` by the mean size of the last page, but at most
    `GROWTH` times as many as the last one, and at most `most_count`. After a failure the count is one: a page
    that missed its deadline may have been too large for the link.
    """

    def __init__(self, most_count: int, *, page_bytes: int = PAGE_BYTES) -> None:
        self.count = min(FIRST_COUNT, most_count)
        self._most_count = most_count
        self._page_bytes = page_bytes

    def took(self, entry_count: int, size_bytes: int) -> None:
        """Note the number of entries and bytes of a page that arrived."""
        fit_count = self._page_bytes * entry_count // max(1, size_bytes)
        self.count = max(1, min(fit_count, GROWTH * self.count, self._most_count))

    def failed(self) -> None:
        """Note that a page did not arrive."""
        self.count = 1
