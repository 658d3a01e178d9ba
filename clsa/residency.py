"""What a running request holds: pages, one window slot, snapshots of its window; and how it comes by them."""

from __future__ import annotations

from clsa.config import PAGE_SIZE
from clsa.pages import PagePool
from clsa.prefix import Hit, PrefixCache
from clsa.request import Request

Copy = tuple[int, int]  # source slot, target slot


def num_pages(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


class Residency:
    """Hands out the state of the model and takes it back. Window slots come first, then snapshot slots.

    Args: `pages`, `slots` and `snapshots` there are; `max_cached_pages` of the prefix cache; `sliding` whether the
    model has sliding layers; `snapshot_every` pages at most between two snapshots of a prompt.
    """

    def __init__(
        self, *, pages: int, slots: int, snapshots: int, max_cached_pages: int, sliding: bool, snapshot_every: int
    ) -> None:
        self.pool = PagePool(pages)
        self.prefix = PrefixCache(self.pool, max_cached_pages, range(slots, slots + snapshots), sliding)
        self.num_slots = slots
        self.free_slots = list(range(slots - 1, -1, -1))
        self._stride = snapshot_every * PAGE_SIZE
        self._snapshotting = sliding and self.prefix.enabled

    def enter(self, request: Request, hit: Hit) -> Copy | None:
        """A request takes a free slot and the pages of its hit. Returns the copy that restores its window."""
        request.pages, request.window_slot = hit.pages, self.free_slots.pop()
        request.num_computed = request.last_snapshot = hit.num_tokens
        request.num_hit = request.num_published = len(hit.pages)
        request.branch = hit.branch
        return None if hit.snapshot is None else (hit.snapshot, request.window_slot)

    def grow(self, request: Request, num_tokens: int) -> None:
        """Pages for so many tokens; that they are available was checked."""
        missing = num_pages(num_tokens) - len(request.pages)
        if missing > 0:
            self.prefix.evict(missing - self.pool.num_free)
            pages = self.pool.allocate(missing)
            if pages is None:
                raise AssertionError(f"{missing} pages were promised, {self.pool.num_free} are free")
            request.pages += pages

    def cut(self, request: Request, stop: int) -> tuple[int, bool]:
        """Where a prefill chunk that could reach `stop` ends, and whether a snapshot is due there.

        Snapshots fall on page boundaries: the last one before the end of the tokens (the same prompt again finds
        it), the one where this prompt leaves what others have had (the next that shares it finds it), and one
        every `snapshot_every` pages; half that distance will do where the budget ends a chunk anyway.
        """
        if not self._snapshotting:
            return stop, False
        start, since = request.num_computed, request.last_snapshot
        last = (request.num_total - 1) // PAGE_SIZE * PAGE_SIZE
        for boundary in (last, request.branch, since + self._stride):
            if start < boundary < stop:
                stop = boundary
        aligned = stop // PAGE_SIZE * PAGE_SIZE
        if start < aligned < last and 2 * (aligned - since) >= self._stride:
            stop = aligned
        due = stop >= last or stop == request.branch or 2 * (stop - since) >= self._stride
        return stop, due and stop % PAGE_SIZE == 0

    def snapshot(self, request: Request, stop: int, *, move: bool) -> Copy | None:
        """Keep the window at `stop`, if a slot can be had. `move` gives up the request's latest snapshot for it."""
        if not self._snapshotting:
            return None
        request.last_snapshot = stop
        if move and request.snapshots:
            slot: int | None = request.snapshots.popitem()[1]
        else:
            slot = self.prefix.take_snapshot()
        if slot is None:
            return None
        request.snapshots[stop] = slot
        return request.window_slot, slot

    def publish(self, request: Request, computed: int, *, final: bool) -> None:
        """Give the cache what others can use of the first `computed` tokens."""
        if not self.prefix.enabled:
            return
        ready = {n: slot for n, slot in request.snapshots.items() if n <= computed}
        boundary = max(ready, default=0) if self._snapshotting else computed
        start = 0 if final else request.num_published
        pages = request.pages[: boundary // PAGE_SIZE]
        if len(pages) <= start:
            return
        later = {n: slot for n, slot in request.snapshots.items() if n > computed}
        request.num_published = self.prefix.insert(request.chain, pages, ready, start=start, final=final)
        # What the cache could not take: the newest may find its place at the end, the others never will.
        for n in sorted(ready)[: None if final else -1]:
            self.prefix.return_snapshot(ready.pop(n))
        request.snapshots = ready | later

    def release(self, request: Request) -> None:
        """Take everything back, and leave to the cache what is known to be good."""
        if request.finish_reason == "error":
            self.prefix.discard(request.chain, request.pages, request.num_hit)
        elif not request.tainted:
            self.publish(request, min(request.num_computed, len(request.tokens)), final=True)
        for slot in request.snapshots.values():
            self.prefix.return_snapshot(slot)
        self.pool.release(request.pages)
        self.free_slots.append(request.window_slot)
        request.pages, request.snapshots, request.window_slot = [], {}, -1

    def stats(self) -> dict[str, int]:
        """Pages are free, cached (by the prefix cache alone) or held by requests."""
        return {
            "slots_total": self.num_slots,
            "slots_free": len(self.free_slots),
            "pages_total": self.pool.num_pages,
            "pages_free": self.pool.num_free,
            "pages_cached": self.pool.num_idle,
            **self.prefix.stats(),
        }
