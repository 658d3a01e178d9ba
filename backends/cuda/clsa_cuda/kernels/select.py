"""`select`: paged index scores and the exact top-k, in two launches.

The first streams K_idx once. It writes each score as an int32 key in the order of scores, and the largest key of
every `group` tokens. The second has one program per query. It finds the k best groups by their maxima (equal ones:
lower position first). No other group can hold one of the k best tokens: k tokens of the kept groups come before any
of its own. What is left is at most k groups of tokens, whatever the scores are, and the k best of those are found
in registers and written in ascending order. Both searches bisect on the keys, so the result is exact, and it does
not depend on the order in which programs ran.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.errors import BackendError
from clsa.ops import Memory, Queries, Selection
from clsa_cuda.kernels.tiles import SelectTiles, limits, next_power_of_2, select_tiles

# Keys are int32 in the order of scores. The lowest int32 is the key of no score: nothing is there.
_ABSENT = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)
_MAX_SCRATCH_BYTES = 256 << 20  # of the scores of the queries that one launch takes


@triton.jit
def _keys_of(scores):
    """int32 in the order of float32 scores: NaN is -inf, -0.0 equals 0.0."""
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_kernel(
    q_idx,  # [T, I]
    k_idx,  # [N, I]
    positions,  # [T]
    sequence,  # [T]
    block_table,  # [B, M]
    keys,  # [T, capacity] out
    maxima,  # [T, capacity / GROUP] out
    q_stride,
    k_stride,
    table_stride,
    capacity,
    max_groups,
    I: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (t, split): the scores of a run of pages for query t."""
    t = tl.program_id(0).to(tl.int64)
    last = tl.load(positions + t)
    num_pages = (last + PAGE) // PAGE  # none for a query at -1
    per_split = tl.cdiv(num_pages, tl.num_programs(1))
    first = tl.program_id(1) * per_split
    stop = tl.minimum(first + per_split, num_pages)
    table = block_table + tl.load(sequence + t).to(tl.int64) * table_stride
    d = tl.arange(0, BLOCK_I)
    token = tl.arange(0, PAGE)
    q = tl.load(q_idx + t * q_stride + d, mask=d < I, other=0.0).to(tl.float32)
    for page in tl.range(first, stop, num_stages=STAGES):
        row = tl.load(table + page).to(tl.int64) * PAGE + token
        pointers = k_idx + row[:, None] * k_stride + d[None, :]
        if BLOCK_I == I:
            k = tl.load(pointers)
        else:
            k = tl.load(pointers, mask=(d < I)[None, :], other=0.0)
        scores = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
        key = tl.where(page * PAGE + token <= last, _keys_of(scores), _ABSENT)
        tl.store(keys + t * capacity + page * PAGE + token, key)
        highest = tl.max(tl.reshape(key, [PAGE // GROUP, GROUP]), axis=1)
        group = tl.arange(0, PAGE // GROUP)
        tl.store(maxima + t * max_groups + page * (PAGE // GROUP) + group, highest)


@triton.jit
def _threshold(tile, want, low, high):
    """The highest key that at least `want` keys of the tile reach; `low` is known to be reached by so many.

    Stops early at a key that exactly `want` reach: it separates as well as the highest one.
    """
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        middle = high - (high - low) // 2
        reach = tl.sum((tile >= middle.to(tl.int32)).to(tl.int32))
        high = tl.where(reach == want, middle, tl.where(reach > want, high, middle - 1))
        low = tl.where(reach >= want, middle, low)
    return low.to(tl.int32)


@triton.jit
def _load_keys(values, start, n, capacity, TILE: tl.constexpr):
    """Keys start to start + TILE of n. The load is masked by the capacity, which leaves it wide."""
    i = start + tl.arange(0, TILE)
    return tl.where(i < n, tl.load(values + i, mask=i < capacity, other=_ABSENT), _ABSENT)


@triton.jit
def _threshold_in_memory(values, n, capacity, want, low, high, TILE: tl.constexpr):
    """`_threshold` of n keys that are too many to hold."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        middle = high - (high - low) // 2
        count = tl.zeros([TILE], tl.int32)
        for start in range(0, n, TILE):
            tile = _load_keys(values, start, n, capacity, TILE)
            count += (tile >= middle.to(tl.int32)).to(tl.int32)
        reach = tl.sum(count)
        high = tl.where(reach == want, middle, tl.where(reach > want, high, middle - 1))
        low = tl.where(reach >= want, middle, low)
    return low.to(tl.int32)


@triton.jit
def _places(tile, threshold, ties):
    """Who is kept and where it goes: all keys above the threshold and the first `ties` that equal it, in order.

    Both counts of the scan share an int32: 16 bits each, for tiles of up to 32768.
    """
    above = (tile > threshold).to(tl.int32)
    equal = (tile == threshold).to(tl.int32)
    counts = tl.cumsum((above << 16) + equal, axis=0).to(tl.uint32, bitcast=True)
    above_before = (counts >> 16).to(tl.int32) - above
    equal_before = (counts & 0xFFFF).to(tl.int32) - equal
    keep = (above != 0) | ((equal != 0) & (equal_before < ties))
    return keep, above_before + tl.minimum(equal_before, tl.maximum(ties, 0))


@triton.jit
def _best_groups(maxima, num_groups, max_groups, want, groups, MAXIMA_TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """Write the ids of the `want` best groups to `groups`, ascending; return a key that all their maxima reach."""
    tile = _load_keys(maxima, 0, num_groups, max_groups, MAXIMA_TILE)
    low_tile = tl.where(tile == _ABSENT, _HIGHEST, tile)
    if ONE_TILE:
        low = tl.min(low_tile)
        high = tl.where(want == num_groups, low, tl.max(tile))
        threshold = _threshold(tile, want, low, high)
        above = tl.sum((tile > threshold).to(tl.int32))
    else:
        high_tile = tile
        for start in range(MAXIMA_TILE, num_groups, MAXIMA_TILE):
            tile = _load_keys(maxima, start, num_groups, max_groups, MAXIMA_TILE)
            low_tile = tl.minimum(low_tile, tl.where(tile == _ABSENT, _HIGHEST, tile))
            high_tile = tl.maximum(high_tile, tile)
        low = tl.min(low_tile)
        high = tl.where(want == num_groups, low, tl.max(high_tile))
        threshold = _threshold_in_memory(maxima, num_groups, max_groups, want, low, high, MAXIMA_TILE)
        count = tl.zeros([MAXIMA_TILE], tl.int32)
        for start in range(0, num_groups, MAXIMA_TILE):
            count += (_load_keys(maxima, start, num_groups, max_groups, MAXIMA_TILE) > threshold).to(tl.int32)
        above = tl.sum(count)
    ties = want - above
    written = 0
    for start in range(0, num_groups, MAXIMA_TILE):
        tile = _load_keys(maxima, start, num_groups, max_groups, MAXIMA_TILE)
        keep, place = _places(tile, threshold, ties)
        tl.store(groups + written + place, start + tl.arange(0, MAXIMA_TILE), mask=keep)
        if not ONE_TILE:
            ties -= tl.sum((tile == threshold).to(tl.int32))
            written += tl.sum(keep.to(tl.int32))
    return threshold


@triton.jit
def _pick_kernel(
    keys,  # [T, capacity]
    maxima,  # [T, capacity / GROUP]
    groups,  # [T, K] scratch
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
    BLOCK_K: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    MAXIMA_TILE: tl.constexpr,
    CHOSEN_TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Program t: the K best positions of query t, ascending, and the rows they lie in."""
    t = tl.program_id(0).to(tl.int64)
    num_tokens = tl.load(positions + t) + 1
    num_groups = tl.cdiv(num_tokens, GROUP)
    num_kept = tl.minimum(num_groups, K)
    own_groups = groups + t * K
    own_maxima = maxima + t * max_groups
    reached = _best_groups(own_maxima, num_groups, max_groups, num_kept, own_groups, MAXIMA_TILE, ONE_TILE)
    tl.debug_barrier()  # other threads read the group ids

    i = tl.arange(0, CHOSEN_TILE // GROUP)
    kept = i < num_kept
    start = tl.load(own_groups + i, mask=kept, other=0) * GROUP  # of each kept group
    table = block_table + tl.load(sequence + t).to(tl.int64) * table_stride
    row = tl.load(table + start // PAGE, mask=kept, other=0) * PAGE + start % PAGE
    token = tl.arange(0, GROUP)[None, :]
    key = tl.load(keys + t * capacity + start[:, None] + token, mask=kept[:, None], other=_ABSENT)
    key = tl.reshape(key, [CHOSEN_TILE])
    want = tl.minimum(num_tokens, K)
    low = tl.min(tl.where(key == _ABSENT, _HIGHEST, key))
    low = tl.where(num_kept == K, tl.maximum(low, reached), low)  # K groups have a token that reaches it
    high = tl.where(want == num_tokens, low, tl.max(key))
    threshold = _threshold(key, want, low, high)
    above = tl.sum((key > threshold).to(tl.int32))
    keep, place = _places(key, threshold, want - above)
    keep = tl.reshape(keep, [CHOSEN_TILE // GROUP, GROUP])
    place = tl.reshape(place, [CHOSEN_TILE // GROUP, GROUP])
    tl.store(chosen_positions + t * K + place, start[:, None] + token, mask=keep)
    tl.store(chosen_rows + t * K + place, row[:, None] + token, mask=keep)
    rest = tl.arange(0, BLOCK_K)
    unused = (rest >= want) & (rest < K)
    nothing = tl.full([BLOCK_K], -1, tl.int32)
    tl.store(chosen_positions + t * K + rest, nothing, mask=unused)
    tl.store(chosen_rows + t * K + rest, nothing, mask=unused)
    tl.store(lengths + t, want)


def score_keys(q_idx: Tensor, k_idx: Tensor, queries: Queries, tiles: SelectTiles) -> tuple[Tensor, Tensor]:
    """Keys of all visible scores [T, capacity] and their maxima by group [T, capacity / group], both int32.

    The capacity is that of the page table; what lies beyond a query's last page stays unwritten.
    """
    num_queries, index_dim = q_idx.shape
    table = queries.block_table
    capacity = table.shape[1] * PAGE_SIZE
    assert q_idx.stride(1) == k_idx.stride(1) == table.stride(1) == 1
    assert queries.positions.is_contiguous() and queries.sequence.is_contiguous()
    keys = torch.empty(num_queries, capacity, dtype=torch.int32, device=q_idx.device)
    maxima = torch.empty(num_queries, capacity // tiles.group, dtype=torch.int32, device=q_idx.device)
    _score_kernel[num_queries, tiles.splits](
        q_idx,
        k_idx,
        queries.positions,
        queries.sequence,
        table,
        keys,
        maxima,
        q_idx.stride(0),
        k_idx.stride(0),
        table.stride(0),
        capacity,
        maxima.shape[1],
        I=index_dim,
        BLOCK_I=next_power_of_2(index_dim),
        PAGE=PAGE_SIZE,
        GROUP=tiles.group,
        STAGES=tiles.score_stages,
        num_warps=tiles.score_warps,
    )
    return keys, maxima


def pick(keys: Tensor, maxima: Tensor, queries: Queries, k: int, tiles: SelectTiles) -> Selection:
    """The selection that `score_keys` prepared, with the same tiles."""
    num_queries, capacity = keys.shape
    # positions, rows, and scratch for the ids of the groups that are kept
    chosen, rows, groups = torch.empty(3, num_queries, k, dtype=torch.int32, device=keys.device)
    lengths = torch.empty(num_queries, dtype=torch.int32, device=keys.device)
    _pick_kernel[num_queries,](
        keys,
        maxima,
        groups,
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
        BLOCK_K=next_power_of_2(k),
        PAGE=PAGE_SIZE,
        GROUP=tiles.group,
        MAXIMA_TILE=tiles.maxima_tile,
        CHOSEN_TILE=tiles.chosen_tile,
        ONE_TILE=maxima.shape[1] <= tiles.maxima_tile,
        num_warps=tiles.pick_warps,
    )
    return Selection(chosen, rows, lengths)


def select(
    q_idx: Tensor, memory: Memory, queries: Queries, k: int, block_size: int, tiles: SelectTiles | None = None
) -> Selection:
    """`Ops.select` for blocks of one token and k up to `tiles.MAX_SELECTED`; `tiles` is for measuring others.

    Each query reads the index keys of its whole sequence: made for decode steps, right for any queries.
    """
    if block_size != 1:
        raise BackendError(f"the select kernel takes index_block_size 1, got {block_size}; use the plain op")
    assert memory.k_idx is not None
    num_queries, max_pages = q_idx.shape[0], queries.block_table.shape[1]
    step = max(1, _MAX_SCRATCH_BYTES // (4 * max_pages * PAGE_SIZE))
    tiles = tiles or select_tiles(min(step, num_queries), max_pages, k, limits(q_idx.device))
    if num_queries == 0:
        nothing = torch.empty(0, k, dtype=torch.int32, device=q_idx.device)
        return Selection(nothing, nothing, nothing.new_empty(0))
    parts = []
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        part = replace(queries, positions=queries.positions[rows], sequence=queries.sequence[rows])
        parts.append(pick(*score_keys(q_idx[rows], memory.k_idx, part, tiles), part, k, tiles))
    if len(parts) == 1:
        return parts[0]
    return Selection(*(torch.cat([getattr(p, name) for p in parts]) for name in ("positions", "rows", "lengths")))
