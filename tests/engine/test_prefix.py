"""The prefix cache: what is found, what is not, and what goes first."""

from __future__ import annotations

import pytest

import clsa.prefix
from clsa.config import PAGE_SIZE as P
from clsa.pages import PagePool
from clsa.prefix import Chain, PrefixCache

SNAPSHOTS = range(10, 14)


class Setup:
    """A pool and a cache, filled the way a request does it."""

    def __init__(self, num_pages: int = 16, max_pages: int = 16, sliding: bool = True) -> None:
        self.pool = PagePool(num_pages)
        self.cache = PrefixCache(self.pool, max_pages, SNAPSHOTS, sliding)

    def put(self, tokens: list[int], boundaries: tuple[int, ...] = (), salt: str = "") -> list[int]:
        """Compute, publish and release the full pages of `tokens`, with snapshots after so many pages."""
        pages = self.take(len(tokens) // P)
        self.cache.insert(Chain(tokens, salt), pages, self.snapshots(*boundaries))
        self.pool.release(pages)
        return pages

    def take(self, n: int) -> list[int]:
        pages = self.pool.allocate(n)
        assert pages is not None
        return pages

    def snapshots(self, *boundaries: int) -> dict[int, int]:
        slots = {pages * P: self.cache.take_snapshot() for pages in boundaries}
        return {n: slot for n, slot in slots.items() if slot is not None}

    def hit(self, tokens: list[int], salt: str = "") -> int:
        """Tokens found."""
        hit = self.cache.match(Chain(tokens, salt))
        assert len(hit.pages) * P == hit.num_tokens
        self.pool.release(hit.pages)
        return hit.num_tokens


def text(pages: int, last: int = 0) -> list[int]:
    return [1] * (pages * P - 1) + [last]


def test_a_hit_shares_pages_and_names_the_snapshot() -> None:
    setup = Setup()
    pages = setup.put(text(3), (2, 3))
    hit = setup.cache.match(Chain([*text(3), 7]))
    assert (hit.pages, hit.num_tokens, hit.snapshot, hit.branch) == (pages, 3 * P, 11, 3 * P)
    assert [setup.pool.count(page) for page in pages] == [2, 2, 2]


def test_at_least_one_token_is_left_to_compute() -> None:
    setup = Setup()
    setup.put(text(3), (2, 3))
    assert setup.hit(text(3)) == 2 * P


def test_only_a_boundary_with_a_snapshot_is_usable_and_the_branch_is_told() -> None:
    setup = Setup()
    setup.put(text(4), (2,))
    hit = setup.cache.match(Chain([*text(4)[: 3 * P], 9]))
    assert (hit.num_tokens, hit.branch) == (2 * P, 3 * P)
    setup.pool.release(hit.pages)
    assert setup.hit(text(2)) == 0


def test_without_sliding_layers_every_boundary_is_usable() -> None:
    setup = Setup(sliding=False)
    setup.put(text(3))
    assert setup.hit([*text(3)[: 2 * P], 9]) == 2 * P
    assert setup.cache.match(Chain([*text(3), 7])).snapshot is None


def test_other_tokens_and_other_tenants_find_nothing() -> None:
    setup = Setup()
    setup.put(text(2), (1, 2), salt="a")
    assert setup.hit([*text(2), 7], salt="a") == 2 * P
    assert setup.hit([2, *text(2)[1:], 7], salt="a") == 0
    assert setup.hit([*text(2), 7]) == setup.hit([*text(2), 7], salt="b") == 0


def test_salt_and_tokens_cannot_be_taken_for_each_other() -> None:
    page = [1] * P
    tokens = b"".join(token.to_bytes(8, "little") for token in page)
    key = Chain(page, "a").key(0)
    assert key != Chain([], "a" + tokens.decode()).key(0)
    assert Chain(page, "").key(0) != Chain(page, "\0").key(0)
    assert Chain(page, "\ud800").key(0) != Chain(page, "").key(0)  # a lone surrogate is no crash


@pytest.mark.parametrize("constant", [b"", b"same for all"])
def test_colliding_digests_never_give_a_wrong_hit(monkeypatch: pytest.MonkeyPatch, constant: bytes) -> None:
    monkeypatch.setattr(clsa.prefix, "_digest", lambda tag, *parts: constant)
    setup = Setup()
    setup.put([1] * P, (1,))
    assert setup.hit([1] * P + [7]) == P
    assert setup.hit([2] * P + [7]) == 0
    assert setup.hit([1] * P + [7], salt="b") == 0
    setup.put([3] * P + [4] * P, (1, 2))
    assert setup.hit([4] * P + [7]) == 0
    assert setup.hit([1] * P + [4] * P + [7]) <= P
    assert setup.pool.num_available == setup.pool.num_pages


def test_keys_are_computed_once_as_the_tokens_grow() -> None:
    chain = Chain([1] * P)
    first = chain.key(0)
    chain.tokens += [2] * P
    assert chain.key(1) != first
    assert chain.keys == [first, chain.key(1)]
    assert chain.key(1) == Chain([1] * P + [2] * P).key(1)


def test_leaves_go_first_and_the_least_recently_used_chain_before_others() -> None:
    setup = Setup(num_pages=5)
    setup.put([1] * 2 * P, (1, 2))
    setup.put([2] * 2 * P, (1, 2))
    assert setup.hit([1] * 2 * P + [7]) == 2 * P
    assert setup.cache.evict(1) == 1
    assert (setup.hit([2] * 2 * P + [7]), setup.hit([1] * 2 * P + [7])) == (P, 2 * P)
    assert setup.cache.evict(2) == 2
    assert (setup.hit([2] * 2 * P + [7]), setup.hit([1] * 2 * P + [7])) == (0, P)
    assert setup.cache.evict(9) == 1
    assert setup.pool.num_free == 5
    assert setup.cache.stats()["snapshots_free"] == len(SNAPSHOTS)


def test_a_whole_old_chain_goes_before_the_last_of_a_newer_one() -> None:
    setup = Setup()
    setup.put(text(3), (3,))
    setup.put([2] * P, (1,))
    assert setup.cache.evict(3) == 3
    assert setup.hit([2] * P + [7]) == P


def test_pages_that_a_request_holds_are_not_evicted() -> None:
    setup = Setup()
    setup.put(text(3), (3,))
    held = setup.cache.match(Chain([*text(3), 7]))
    assert setup.cache.evict(3) == 0
    assert len(setup.cache) == 3
    setup.pool.release(held.pages)
    assert setup.cache.evict(3) == 3


def test_the_same_tokens_are_kept_once() -> None:
    setup = Setup()
    first = setup.put(text(2), (2,))
    chain, pages = Chain([*text(2)]), setup.take(2)
    assert setup.cache.insert(chain, pages, {}, final=False) == 2
    assert setup.pool.count(first[0]) == 0
    assert [setup.pool.count(page) for page in pages] == [2, 2]
    assert setup.hit([*text(2), 7]) == 2 * P


def test_a_running_request_puts_nothing_below_pages_that_it_does_not_hold() -> None:
    setup = Setup()
    setup.put(text(1, last=5), (1,))
    other = setup.cache.match(Chain([*text(1, last=5), 7]))
    chain = Chain(text(1, last=5) + [2] * P)
    pages = setup.take(2)
    snapshots = setup.snapshots(1, 2)
    assert setup.cache.insert(chain, pages, snapshots, final=False) == 0
    assert list(snapshots) == [2 * P]
    assert setup.cache.insert(chain, pages, snapshots, final=True) == 0
    setup.pool.release(pages)
    assert snapshots == {}
    assert setup.hit([*chain.tokens, 7]) == 2 * P
    setup.pool.release(other.pages)
    assert setup.cache.evict(9) == 2


def test_a_snapshot_that_is_there_already_is_given_back() -> None:
    setup = Setup()
    setup.put(text(1), (1,))
    setup.put(text(1), (1,))
    assert setup.cache.stats()["snapshots_free"] == len(SNAPSHOTS) - 1


def test_the_number_of_pages_is_bounded() -> None:
    setup = Setup(max_pages=2)
    setup.put([1] * P, (1,))
    setup.put([2] * P, (1,))
    setup.put([3] * P, (1,))
    assert [setup.hit([token] * P + [7]) for token in (1, 2, 3)] == [0, P, P]
    chain, pages = Chain([4] * 3 * P), setup.take(3)
    assert setup.cache.insert(chain, pages, {}, final=False) == 2
    assert len(setup.cache) == 2


def test_the_least_recently_used_snapshot_makes_room() -> None:
    setup = Setup()
    for token in range(len(SNAPSHOTS)):
        setup.put([token] * P, (1,))
    assert setup.hit([0] * P + [7]) == P
    slot = setup.cache.take_snapshot()
    assert slot is not None
    assert [setup.hit([token] * P + [7]) for token in (0, 1, 2)] == [P, 0, P]
    setup.cache.return_snapshot(slot)
    assert setup.cache.stats()["snapshots_free"] == 1


def test_no_slot_at_all() -> None:
    cache = PrefixCache(PagePool(1), 1, range(0))
    assert cache.take_snapshot() is None
    assert not cache.enabled


def test_discarded_pages_are_gone_with_all_that_came_after_them() -> None:
    setup = Setup()
    pages = setup.put(text(3), (1, 2, 3))
    setup.cache.discard(Chain(text(3)), pages[:2], 1)
    assert setup.hit([*text(3), 7]) == P
    assert setup.cache.evict(9) == 2
    setup.put(text(3), (3,))
    assert setup.hit([*text(3), 7]) == 3 * P


def test_what_lost_its_ancestors_gives_way_to_the_same_tokens() -> None:
    setup = Setup()
    pages = setup.put(text(3), (1, 2, 3))
    setup.cache.discard(Chain(text(3)), pages[:1], 0)
    assert setup.hit([*text(3), 7]) == 0
    setup.put(text(3), (3,))
    assert setup.hit([*text(3), 7]) == 3 * P
    assert len(setup.cache) == 3


def test_a_request_whose_published_pages_were_discarded_starts_over() -> None:
    setup = Setup()
    chain = Chain(text(1) + [2] * P)
    pages, others = setup.take(2), setup.take(1)
    assert setup.cache.insert(chain, pages[:1], {}, final=False) == 1
    setup.cache.discard(chain, pages[:1], 0)
    assert setup.cache.insert(Chain(text(1)), others, {}, final=False) == 1
    assert setup.cache.insert(chain, pages, {}, start=1, final=False) == 0
    assert len(setup.cache) == 1


def test_another_requests_page_is_not_discarded() -> None:
    setup = Setup()
    setup.put(text(2), (2,))
    setup.cache.discard(Chain(text(2)), setup.take(2), 0)
    assert setup.hit([*text(2), 7]) == 2 * P
