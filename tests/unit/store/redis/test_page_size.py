"""The number of entries that a reader asks for."""

from __future__ import annotations

from dynamo_redis.store.redis.page_size import FIRST_COUNT, GROWTH, PageSize


def test_page_begins_small_and_grows_while_entries_are_small() -> None:
    page = PageSize(500, page_bytes=1000)
    counts = [page.count]
    while page.count < 500:
        page.took(1, 1)
        counts.append(page.count)
    assert counts == [FIRST_COUNT, FIRST_COUNT * GROWTH, FIRST_COUNT * GROWTH**2, 500]


def test_page_holds_about_its_limit_of_bytes() -> None:
    page = PageSize(500, page_bytes=1000)
    page.took(10, 2000)
    assert page.count == 5
    page.took(1, 10_000)
    assert page.count == 1


def test_page_is_one_entry_after_a_failure() -> None:
    page = PageSize(500, page_bytes=1000)
    page.failed()
    assert page.count == 1
    page.took(1, 10)
    assert page.count == GROWTH


def test_page_of_entries_without_content_is_no_fault() -> None:
    page = PageSize(20, page_bytes=1000)
    page.took(3, 0)
    assert page.count == 20
