"""Prefix reuse: full pages that stay in memory after their request, found again by their tokens.

The key of a page is a sha256 over the key of the page before it and its own tokens, so it stands for the whole
prefix; the first link is the tenant's salt. Keys only find: tokens and salt are compared before anything is
shared. Sliding layers need their window too, so a prefix can be taken up only at a boundary that has a snapshot.

An entry is idle when no request holds its page. Whoever holds the page of an entry holds the pages of all its
ancestors, hence the descendants of an idle entry are idle, and evicting leaves first can reach every idle page.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

from clsa.config import PAGE_SIZE
from clsa.pages import PagePool


def _digest(tag: bytes, *parts: bytes) -> bytes:
    """sha256 over tagged, length-prefixed parts: no two different lists of parts read the same."""
    digest = hashlib.sha256(tag)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


@dataclass(slots=True, eq=False)
class Chain:
    """A growing sequence of tokens of one tenant, with the keys of its full pages, each computed once."""

    tokens: list[int]
    salt: str = ""
    keys: list[bytes] = field(init=False, default_factory=list)

    def page(self, i: int) -> list[int]:
        """Tokens of page i."""
        return self.tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]

    def key(self, i: int) -> bytes:
        """Key of the first i + 1 pages, all of which must be full."""
        keys = self.keys
        while len(keys) <= i:
            before = keys[-1] if keys else _digest(b"salt", self.salt.encode("utf-8", "surrogatepass"))
            keys.append(_digest(b"page", before, array("q", self.page(len(keys))).tobytes()))
        return keys[i]


@dataclass(frozen=True, slots=True)
class Hit:
    """A prefix found: the caller now holds one reference to each of `pages`.

    `snapshot` is the slot of the window state after `num_tokens` tokens, None without sliding layers or tokens.
    `branch` is the boundary up to which cached pages have the same tokens, with or without a snapshot.
    """

    pages: list[int]
    num_tokens: int
    snapshot: int | None
    branch: int


@dataclass(slots=True, eq=False)
class _Entry:
    key: bytes
    tokens: list[int]
    salt: str
    parent: _Entry | None
    page: int
    snapshot: int | None = None
    children: int = 0


class PrefixCache:
    """Pages and window snapshots of finished and running requests, bounded, least recently used first out.

    Args: `pool` whose pages it shares; `max_pages` it may reference; `snapshot_slots` it may hand out; whether a
    prefix needs a snapshot (`needs_snapshot`: the model has sliding layers).
    """

    def __init__(
        self, pool: PagePool, max_pages: int, snapshot_slots: range = range(0), needs_snapshot: bool = True
    ) -> None:
        self.needs_snapshot = needs_snapshot
        self.enabled = max_pages > 0 and (len(snapshot_slots) > 0 or not needs_snapshot)
        self.evictions = 0
        self._pool = pool
        self.max_pages = max_pages
        self._num_snapshots = len(snapshot_slots)
        self._free_snapshots = list(reversed(snapshot_slots))
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first
        self._with_snapshot: OrderedDict[bytes, _Entry] = OrderedDict()  # the same order

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, chain: Chain) -> Hit:
        """The longest usable prefix, at least one token short of the whole chain. Shares its pages."""
        found: list[_Entry] = []
        usable = 0
        for i in range((len(chain.tokens) - 1) // PAGE_SIZE if self._entries else 0):
            entry = self._find(chain, i, found[-1] if found else None)
            if entry is None:
                break
            found.append(entry)
            if entry.snapshot is not None or not self.needs_snapshot:
                usable = len(found)
        hit = found[:usable]
        self._touch(hit)
        pages = [entry.page for entry in hit]
        self._pool.share(pages)
        snapshot = hit[-1].snapshot if hit else None
        return Hit(pages, usable * PAGE_SIZE, snapshot, len(found) * PAGE_SIZE)

    def insert(
        self, chain: Chain, pages: list[int], snapshots: dict[int, int], *, start: int = 0, final: bool = True
    ) -> int:
        """Cache the pages of a chain and its snapshots; the caller still holds the pages.

        Args: `pages` of the chain from its beginning, all full; `snapshots` by number of tokens: those the cache
        takes over (or has already, and frees) are removed from the dict; `start` pages were inserted before;
        `final` the caller is about to release the pages. Returns how many leading pages are now cached as they
        are. A caller that goes on running cannot put pages below another request's copy of the same tokens,
        because it does not hold that copy (see the rule at the top).
        """
        parent = self._entries.get(chain.key(start - 1)) if start else None
        if parent is None or parent.page != pages[start - 1]:
            start, parent = 0, None
        own, chained = start, []
        for i in range(start, len(pages)):
            entry = self._find(chain, i, parent)
            if entry is None:
                if not (final or own == i) or not self._make_room(chain.key(i)):
                    break
                entry = self._add(chain, i, parent, pages[i])
            elif entry.page != pages[i] and (final or own == i) and self._pool.count(entry.page) == 1:
                self._replace(entry, pages[i])
            own += own == i and entry.page == pages[i]
            self._attach(entry, (i + 1) * PAGE_SIZE, snapshots)
            chained.append(entry)
            parent = entry
        self._touch(chained)
        return own

    def discard(self, chain: Chain, pages: list[int], start: int) -> None:
        """Forget a request's own pages from page `start` on. What is cached below them can't be found any more."""
        for i in range(start, min(len(pages), len(chain.tokens) // PAGE_SIZE)):
            entry = self._entries.get(chain.key(i))
            if entry is not None and entry.page == pages[i]:
                self._remove(entry)

    def evict(self, n: int) -> int:
        """Give up to n idle pages back to the pool, least recently used leaves first. Returns how many."""
        freed = skipped = 0
        while freed < n and self._pool.num_idle:
            key, entry = next(iter(self._entries.items()))
            if entry.children or self._pool.count(entry.page) > 1:
                self._entries.move_to_end(key)
                skipped += 1
                if skipped > 2 * len(self._entries):
                    raise AssertionError("an idle page of the prefix cache can't be reached")
                continue
            self._remove(entry)
            freed, skipped = freed + 1, 0
        self.evictions += freed
        return freed

    def take_snapshot(self) -> int | None:
        """A snapshot slot for the caller to own: a free one, or the least recently used of the cache, or None."""
        if not self._free_snapshots and self._with_snapshot:
            self._detach(next(iter(self._with_snapshot.values())))
        return self._free_snapshots.pop() if self._free_snapshots else None

    def return_snapshot(self, slot: int) -> None:
        """Take a slot back from the caller."""
        self._free_snapshots.append(slot)

    def stats(self) -> dict[str, int]:
        return {
            "prefix_pages": len(self._entries),
            "prefix_evictions": self.evictions,
            "snapshots_total": self._num_snapshots,
            "snapshots_free": len(self._free_snapshots),
            "snapshots_cached": len(self._with_snapshot),
        }

    def _find(self, chain: Chain, i: int, parent: _Entry | None) -> _Entry | None:
        entry = self._entries.get(chain.key(i))
        if entry is None or entry.parent is not parent or entry.salt != chain.salt or entry.tokens != chain.page(i):
            return None
        return entry

    def _make_room(self, key: bytes) -> bool:
        stale = self._entries.get(key)
        if stale is not None:  # its ancestors were discarded (or sha256 collided): nothing finds it any more
            self._remove(stale)
        return len(self._entries) < self.max_pages or self.evict(1) == 1

    def _add(self, chain: Chain, i: int, parent: _Entry | None, page: int) -> _Entry:
        entry = _Entry(chain.key(i), chain.page(i), chain.salt, parent, page)
        self._pool.cache(page)
        self._entries[entry.key] = entry
        if parent is not None:
            parent.children += 1
        return entry

    def _replace(self, entry: _Entry, page: int) -> None:
        """The same tokens in two pages: keep the one that a request holds."""
        self._pool.uncache(entry.page)
        self._pool.cache(page)
        entry.page = page

    def _remove(self, entry: _Entry) -> None:
        self._pool.uncache(entry.page)
        if entry.snapshot is not None:
            self._detach(entry)
        if entry.parent is not None:
            entry.parent.children -= 1
        del self._entries[entry.key]

    def _attach(self, entry: _Entry, num_tokens: int, snapshots: dict[int, int]) -> None:
        slot = snapshots.pop(num_tokens, None)
        if slot is None:
            return
        if entry.snapshot is not None:
            self._free_snapshots.append(slot)
            return
        entry.snapshot = slot
        self._with_snapshot[entry.key] = entry

    def _detach(self, entry: _Entry) -> None:
        if entry.snapshot is not None:
            self._free_snapshots.append(entry.snapshot)
        entry.snapshot = None
        del self._with_snapshot[entry.key]

    def _touch(self, chain: list[_Entry]) -> None:
        """Mark as used now, the deepest first, so that a child is always older than its parent."""
        for entry in reversed(chain):
            self._entries.move_to_end(entry.key)
        if chain and chain[-1].snapshot is not None:
            self._with_snapshot.move_to_end(chain[-1].key)
