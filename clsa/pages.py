"""Who holds which page of the memory: reference counts over page ids.

A page is free (count 0), held by requests, cached (the prefix cache holds one reference), or both. A cached page
that no request holds is idle: it counts as available, because the cache gives it up on demand.
"""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Page ids 0..num_pages-1. Wrong use is a bug of the program and raises AssertionError."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_idle = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._counts = [0] * num_pages
        self._cached = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that are free or that the cache can give up."""
        return len(self._free) + self.num_idle

    def count(self, page: int) -> int:
        """References to a page."""
        return self._counts[page]

    def allocate(self, n: int) -> list[int] | None:
        """n free pages with one reference each, the latest released first; None if there are fewer."""
        if n > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each page."""
        for page in pages:
            self._check(page)
            if self._cached[page] and self._counts[page] == 1:
                self.num_idle -= 1
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each page; those without any are free."""
        for page in pages:
            self._check(page)
            self._counts[page] -= 1
            if not self._counts[page]:
                if self._cached[page]:
                    raise AssertionError(f"page {page} was released by a request that does not hold it")
                self._free.append(page)
            elif self._cached[page] and self._counts[page] == 1:
                self.num_idle += 1

    def cache(self, page: int) -> None:
        """The prefix cache takes its reference to a page that a request holds."""
        self._check(page)
        if self._cached[page]:
            raise AssertionError(f"page {page} is cached twice")
        self._cached[page] = 1
        self._counts[page] += 1

    def uncache(self, page: int) -> None:
        """The prefix cache gives its reference up."""
        self._check(page)
        if not self._cached[page]:
            raise AssertionError(f"page {page} is not cached")
        if self._counts[page] == 1:
            self.num_idle -= 1
        self._cached[page] = 0
        self.release((page,))

    def _check(self, page: int) -> None:
        if not 0 <= page < self.num_pages:
            raise AssertionError(f"page {page} does not exist; there are {self.num_pages}")
        if not self._counts[page]:
            raise AssertionError(f"page {page} is free and cannot be shared or released")
