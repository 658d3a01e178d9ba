"""The second half of `select`: from the keys of all scores and their maxima by group to the k best positions.

Several programs share a query. Each finds by itself a bound that at least k maxima reach, and so at least k tokens:
no token below it is among the k best. It lists what reaches the bound in its slice of the tokens. The program that
arrives last finds the k best among all lists, some more than k tokens, and writes them in ascending order. What is
kept depends on the keys alone, never on the bound, the path of a search or the order in which programs ran.

A bound need not be the highest possible one, so its search is short, and so are the lists unless many scores tie or
the best tokens lie side by side; then the last program goes through them in several blocks. Where all tokens fit one
block, one program finds the best among them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Queries, Selection
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters, wait
from clsa_cuda.kernels.search import ABSENT, both, load_keys, lowest_and_highest, search
from clsa_cuda.kernels.tiles import SelectTiles, launch_options, limits, next_power_of_2

_SLICE = tl.constexpr(128)  # slices of the tokens are multiples of it, which keeps their loads wide


@triton.jit
def _bound(keys, maxima, num_tokens, capacity, max_groups, K, GROUP: tl.constexpr, LENGTH: tl.constexpr):
    """A key that the best min(num_tokens, K) tokens reach and few others, and the highest of all keys."""
    num_groups = tl.cdiv(num_tokens, GROUP)
    # No more groups than tokens to find: a group that is not one of the best may hold several of those.
    values, n, room = keys, num_tokens, capacity
    if num_groups > K:
        values, n, room = maxima, num_groups, max_groups
    want = tl.minimum(n, K)
    base = tl.zeros([1], tl.int32)
    count = base + n
    tile = load_keys(values, base, count, 0, room, LENGTH)
    low, high = lowest_and_highest(tile, values, base, count, n, room, LENGTH)
    slack = tl.minimum(want, n - want) // 8
    bound, _ = search(tile, values, base, count, n, room, want, slack, n, low, high, LENGTH)
    return bound, high


@triton.jit
def _equal_and_above(tile, threshold):
    """Whether keys equal the threshold in the lower, and lie above it in the upper 16 bits."""
    return tl.where(tile > threshold, 0x10000, (tile == threshold).to(tl.int32))


@triton.jit
def _places(tile, threshold, ties, above_before, equal_before):
    """Who is kept and where it goes: all keys above the threshold and the first `ties` that equal it, in order.

    How many of either lie in front of each row [ROWS]. Both counts of the scan share an int32.
    """
    equal, above = both(tl.cumsum(_equal_and_above(tile, threshold), axis=1))  # up to and with each key
    equal += equal_before[:, None]
    keep = (tile > threshold) | ((tile == threshold) & (equal <= ties))
    place = above + tl.minimum(equal, ties) + (above_before[:, None] - 1)
    # Not so, but each thread then stores where its own keys go, instead of handing 8-byte pointers to another thread;
    # that the mask differs from key to key already keeps the stores apart.
    return keep, tl.max_contiguous(tl.multiple_of(place, (1, 4)), (1, 4))


@triton.jit
def _list(tile, keys, listed_keys, listed, first, stop, bound, capacity, LENGTH: tl.constexpr):
    """Write keys and positions of what reaches the bound between first and stop from place `first`; returns how many.

    `tile` [1, LENGTH] are the first keys.
    """
    base = tl.zeros([1], tl.int32)
    i = tl.arange(0, LENGTH)[None, :]
    written = tl.full([], 0, tl.int32)
    for start in range(first, stop, LENGTH):
        # A capacity of nothing: a load that is not made.
        room = tl.where(start + LENGTH < stop, capacity, 0)
        ahead = load_keys(keys, base, base + stop, start + LENGTH, room, LENGTH)
        keep = tile >= bound
        place = tl.cumsum(keep.to(tl.int32), axis=1) + (first + written - 1)
        place = tl.max_contiguous(tl.multiple_of(place, (1, 4)), (1, 4))  # as in _places
        tl.store(listed_keys + place, tile, mask=keep)
        tl.store(listed + place, start + i, mask=keep)
        written += tl.sum(keep.to(tl.int32))
        tile = ahead
    return written


@triton.jit
def _load_positions(listed, base, start, capacity, LENGTH: tl.constexpr, LISTED: tl.constexpr):
    """[ROWS, LENGTH]: what `load_keys` read the keys of; any number where no key is."""
    i = base[:, None] + start + tl.arange(0, LENGTH)[None, :]
    return tl.load(listed + i, mask=i < capacity, other=0) if LISTED else i


@triton.jit
def _load_pages(table, positions, tile, PAGE: tl.constexpr):
    page = positions // PAGE
    page = tl.max_contiguous(tl.multiple_of(page, (1, 4)), (1, 4))  # as in _places
    return tl.load(table + page, mask=tile != ABSENT, other=0)


@triton.jit
def _write_best(
    tile,  # [ROWS, LENGTH] first block of the lists
    values,
    listed,
    base,
    count,
    longest,
    capacity,
    low,
    high,
    want,
    table,
    chosen_positions,
    chosen_rows,
    LENGTH: tl.constexpr,
    PAGE: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Write positions and rows of the `want` best of the lists, in their order. All keys lie in [low, high]."""
    positions = _load_positions(listed, base, 0, capacity, LENGTH, LISTED)
    pages = _load_pages(table, positions, tile, PAGE)
    threshold, ties = search(tile, values, base, count, longest, capacity, want, 0, tl.sum(count), low, high, LENGTH)
    equal, above = both(tl.sum(_equal_and_above(tile, threshold), axis=1))
    for start in range(LENGTH, longest, LENGTH):
        more = load_keys(values, base, count, start, capacity, LENGTH)
        more_equal, more_above = both(tl.sum(_equal_and_above(more, threshold), axis=1))
        above += more_above
        equal += more_equal
    before = tl.cumsum((above.to(tl.int64) << 32) + equal, axis=0)  # and in the row
    above, equal = (before >> 32).to(tl.int32) - above, before.to(tl.int32) - equal
    for start in range(0, longest, LENGTH):
        if start > 0:
            tile = load_keys(values, base, count, start, capacity, LENGTH)
            positions = _load_positions(listed, base, start, capacity, LENGTH, LISTED)
            pages = _load_pages(table, positions, tile, PAGE)
        keep, place = _places(tile, threshold, ties, above, equal)
        tl.store(chosen_positions + place, positions, mask=keep)
        tl.store(chosen_rows + place, pages * PAGE + positions % PAGE, mask=keep)
        if start + LENGTH < longest:
            more_equal, more_above = both(tl.sum(_equal_and_above(tile, threshold), axis=1))
            above += more_above
            equal += more_equal


@triton.jit
def _finish(chosen_positions, chosen_rows, length, want, K, BLOCK_K: tl.constexpr):
    """Write what is not chosen, and how many are."""
    rest = tl.arange(0, BLOCK_K)
    unused = (rest >= want) & (rest < K)
    nothing = tl.full([BLOCK_K], -1, tl.int32)
    tl.store(chosen_positions + rest, nothing, mask=unused)
    tl.store(chosen_rows + rest, nothing, mask=unused)
    tl.store(length, want)


@launcher
@triton.jit(do_not_specialize=["splits"])
def _pick_kernel(
    keys,  # [T, capacity]
    maxima,  # [T, max_groups]
    listed_keys,  # [T, capacity] scratch, not with WHOLE
    listed,  # [T, capacity] scratch, not with WHOLE
    counts,  # [T, splits] scratch, not with WHOLE
    arrived,  # [T] int32, zeros before and after
    positions,  # [T]
    sequence,  # [T]
    block_table,  # [B, M]
    chosen_positions,  # [T, K] out
    chosen_rows,  # [T, K] out
    lengths,  # [T] out
    table_stride,
    capacity,
    max_groups,
    K,
    splits,
    BLOCK_K: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    SEARCH_TILE: tl.constexpr,
    LIST_TILE: tl.constexpr,
    CHOSEN_TILE: tl.constexpr,
    ROWS: tl.constexpr,  # next power of two of splits
    WHOLE: tl.constexpr,  # one program finds the best of all tokens in a tile of theirs, CHOSEN_TILE
    OVERLAP: tl.constexpr,
):
    """Program (t, split): the list of a slice of query t; the last one: its K best positions and their rows."""
    t = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    # Written before the kernel in front began, which makes the scores.
    num_tokens = tl.load(positions + t) + 1
    table = block_table + tl.load(sequence + t).to(tl.int64) * table_stride
    wait(OVERLAP)
    keys += t * capacity
    maxima += t * max_groups
    listed_keys += t * capacity
    listed += t * capacity
    counts += t * splits
    chosen_positions += t * K
    chosen_rows += t * K
    LENGTH: tl.constexpr = CHOSEN_TILE // ROWS
    row = tl.arange(0, ROWS)
    want = tl.minimum(num_tokens, K)
    if WHOLE:
        count = row + num_tokens
        tile = load_keys(keys, row, count, 0, capacity, LENGTH)
        low, high = lowest_and_highest(tile, keys, row, count, LENGTH, capacity, LENGTH)
        _write_best(
            *(tile, keys, listed, row, count, LENGTH, capacity, low, high, want, table),
            *(chosen_positions, chosen_rows, LENGTH, PAGE, False),
        )
        _finish(chosen_positions, chosen_rows, lengths + t, want, K, BLOCK_K)
    else:
        size = tl.cdiv(num_tokens, splits * _SLICE) * _SLICE
        first = split * size
        stop = tl.minimum(first + size, num_tokens)
        one = tl.zeros([1], tl.int32)
        own = load_keys(keys, one, one + stop, first, capacity, LIST_TILE)
        bound, high = _bound(keys, maxima, num_tokens, capacity, max_groups, K, GROUP, SEARCH_TILE)
        written = _list(own, keys, listed_keys, listed, first, stop, bound, capacity, LIST_TILE)
        tl.store(counts + split, written)
        tl.debug_barrier()  # all of this program's stores come before its arrival, and before it reads them
        if tl.atomic_add(arrived + t, 1, sem="acq_rel") == splits - 1:
            count = tl.load(counts + row, mask=row < splits, other=0)
            tile = load_keys(listed_keys, row * size, count, 0, capacity, LENGTH)
            _write_best(
                *(tile, listed_keys, listed, row * size, count, tl.max(count), capacity, bound, high, want, table),
                *(chosen_positions, chosen_rows, LENGTH, PAGE, True),
            )
            _finish(chosen_positions, chosen_rows, lengths + t, want, K, BLOCK_K)
            tl.store(arrived + t, 0)


def pick(keys: Tensor, maxima: Tensor, queries: Queries, k: int, tiles: SelectTiles) -> Selection:
    """The selection from keys [T, capacity] and maxima [T, capacity / group] as `score_keys` makes them."""
    num_queries, capacity = keys.shape
    device = limits(keys.device)
    whole = capacity <= tiles.search_tile
    splits = 1 if whole else tiles.pick_splits
    assert whole or num_queries <= MAX_ARRIVALS
    # Positions and rows; keys and positions of the lists, and their lengths.
    chosen, rows = torch.empty(2, num_queries, k, dtype=torch.int32, device=keys.device)
    listed_keys, listed = torch.empty(2, 0 if whole else num_queries, capacity, dtype=torch.int32, device=keys.device)
    counts = torch.empty(num_queries, splits, dtype=torch.int32, device=keys.device)
    lengths = torch.empty(num_queries, dtype=torch.int32, device=keys.device)
    _pick_kernel[num_queries, splits](
        keys,
        maxima,
        listed_keys,
        listed,
        counts,
        arrival_counters(keys.device),
        queries.positions,
        queries.sequence,
        queries.block_table,
        chosen,
        rows,
        lengths,
        queries.block_table.stride(0),
        capacity,
        maxima.shape[1],
        k,
        splits,
        BLOCK_K=next_power_of_2(k),
        PAGE=PAGE_SIZE,
        GROUP=tiles.group,
        SEARCH_TILE=min(tiles.search_tile, next_power_of_2(maxima.shape[1])),
        LIST_TILE=tiles.list_tile,
        CHOSEN_TILE=next_power_of_2(capacity) if whole else tiles.chosen_tile,
        ROWS=next_power_of_2(splits),
        WHOLE=whole,
        OVERLAP=device.early_launch,
        num_warps=tiles.pick_warps,
        **launch_options(device),
    )
    return Selection(chosen, rows, lengths)
