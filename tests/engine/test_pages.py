"""Reference counts of pages."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from clsa.pages import PagePool


def test_allocate_share_release() -> None:
    pool = PagePool(4)
    assert pool.allocate(5) is None
    pages = pool.allocate(3)
    assert pages == [0, 1, 2]
    assert pool.num_free == 1
    pool.share(pages[:1])
    pool.release(pages)
    assert (pool.count(0), pool.count(1), pool.num_free) == (1, 0, 3)
    pool.release([0])
    assert pool.num_free == pool.num_available == 4


def test_the_page_released_last_is_used_first() -> None:
    pool = PagePool(8)
    pool.allocate(5)
    pool.release([1, 3])
    assert pool.allocate(3) == [3, 1, 5]


def test_a_failed_allocation_takes_nothing() -> None:
    pool = PagePool(2)
    assert pool.allocate(3) is None
    assert pool.allocate(2) == [0, 1]


def test_a_cached_page_without_a_request_is_idle_and_available() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    assert pages is not None
    pool.cache(pages[0])
    assert (pool.num_free, pool.num_idle, pool.num_available) == (0, 0, 0)
    pool.release(pages)
    assert (pool.num_free, pool.num_idle, pool.num_available) == (1, 1, 2)
    pool.share(pages[:1])
    assert pool.num_idle == 0
    pool.release(pages[:1])
    pool.uncache(pages[0])
    assert (pool.num_free, pool.num_idle) == (2, 0)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda pool: pool.release([1]), "page 1 is free"),
        (lambda pool: pool.release([0, 0]), "page 0 is free"),
        (lambda pool: pool.share([1]), "page 1 is free"),
        (lambda pool: pool.release([-1]), "page -1 does not exist; there are 2"),
        (lambda pool: pool.share([2]), "page 2 does not exist"),
        (lambda pool: pool.uncache(0), "page 0 is not cached"),
        (lambda pool: pool.cache(1), "page 1 is free"),
        (lambda pool: (pool.cache(0), pool.cache(0)), "page 0 is cached twice"),
        (lambda pool: (pool.cache(0), pool.release([0, 0])), "page 0 was released by a request that does not hold it"),
    ],
)
def test_misuse_is_an_error(misuse: Callable[[PagePool], object], message: str) -> None:
    pool = PagePool(2)
    assert pool.allocate(1) == [0]
    with pytest.raises(AssertionError, match=message):
        misuse(pool)
