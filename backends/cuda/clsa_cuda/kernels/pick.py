"""The second half of `select`: from the keys of all scores and their maxima by group to the k best positions.

One program per query. It finds the k best groups by their maxima (equal ones: lower position first). No other group
can hold one of the k best tokens: k tokens of the kept groups come before any of its own. What is left is at most k
groups of tokens, whatever the scores are, and the k best of those are found in registers and written in ascending
order. What is kept depends on the keys alone, never on the path of a search or the order in which programs ran.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Queries, Selection
from clsa_cuda.kernels.overlap import wait
from clsa_cuda.kernels.tiles import SelectTiles, launch_options, limits, next_power_of_2

# Keys are int32 in the order of scores. The lowest int32 is the key of no score: nothing is there.
ABSENT = tl.constexpr(-(2**31))
_LOWEST = tl.constexpr(-(2**31) + 2**23 - 1)  # the key of -inf
_LARGEST = tl.constexpr(3.0e38)


@triton.jit
def keys_of(scores):
    """int32 in the order of float32 scores: NaN is -inf, -0.0 equals 0.0."""
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _finite_score(key):
    bits = key.to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.minimum(tl.maximum(bits.to(tl.float32, bitcast=True), -_LARGEST), _LARGEST)


@triton.jit
def _load_keys(values, start, n, capacity, TILE: tl.constexpr):
    """Keys start to start + TILE of n. The load is masked by the capacity, which leaves it wide."""
    i = start + tl.arange(0, TILE)
    return tl.where(i < n, tl.load(values + i, mask=i < capacity, other=ABSENT), ABSENT)


@triton.jit
def _reach(tile, values, n, capacity, a, b, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """How many keys reach a, and how many reach b >= a; of the tile, or of all tiles in memory.

    Two counts share an int32, 16 bits each: a tile has at most 32768 keys.
    """
    if ONE_TILE:
        both = tl.sum(tl.where(tile >= b, 0x10001, (tile >= a).to(tl.int32))).to(tl.uint32, bitcast=True)
        return (both & 0xFFFF).to(tl.int32), (both >> 16).to(tl.int32)
    counts = tl.zeros([TILE], tl.int32)
    for start in range(0, n, TILE):
        tile = _load_keys(values, start, n, capacity, TILE)
        counts += tl.where(tile >= b, 0x10001, (tile >= a).to(tl.int32))
    return tl.sum(counts & 0xFFFF), tl.sum(counts >> 16)


@triton.jit
def _threshold(tile, values, n, capacity, want, reach_low, low, high, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """The highest key that at least `want` keys reach, and how many of the keys that equal it belong to the `want`.

    It lies in [low, high]; `reach_low` >= want keys reach low and none high + 1. Stops early at a key that exactly
    `want` reach: it separates as well as the highest one. Each step counts at the middle of what is left, so that 32
    steps do for any keys, and where the scores would put the threshold if the logarithm of the count fell evenly with
    the score: from 16384 keys about 8 steps to the end for most distributions, where bisection alone takes 20.
    """
    low, high = low.to(tl.int64), high.to(tl.int64)
    high = tl.where(reach_low == want, low, high)
    reach_high = tl.full([], 0, tl.int32)  # how many keys reach high + 1
    while low < high:
        middle = high - (high - low) // 2
        top = tl.log2(reach_low.to(tl.float32))
        part = (top - tl.log2(want.to(tl.float32))) / (top - tl.log2(tl.maximum(reach_high.to(tl.float32), 0.5)))
        guess = keys_of(_finite_score(low) * (1.0 - part) + _finite_score(high) * part).to(tl.int64)
        guess = tl.minimum(tl.maximum(guess, low + 1), high)
        a, b = tl.minimum(guess, middle), tl.maximum(guess, middle)
        reach_a, reach_b = _reach(tile, values, n, capacity, a.to(tl.int32), b.to(tl.int32), TILE, ONE_TILE)
        high = tl.where(reach_a < want, a - 1, tl.where(reach_b < want, b - 1, high))
        reach_high = tl.where(reach_a < want, reach_a, tl.where(reach_b < want, reach_b, reach_high))
        low = tl.where(reach_b >= want, b, tl.where(reach_a >= want, a, low))
        reach_low = tl.where(reach_b >= want, reach_b, tl.where(reach_a >= want, reach_a, reach_low))
        high = tl.where(reach_low == want, low, high)
    return low.to(tl.int32), tl.where(reach_low == want, want, want - reach_high)


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
    place = above_before + tl.minimum(equal_before, tl.maximum(ties, 0))
    # Not so, but each thread then stores where its own keys go, instead of handing 8-byte pointers to another thread;
    # that the mask differs from key to key already keeps the stores apart.
    return keep, tl.max_contiguous(tl.multiple_of(place, 4), 4)


@triton.jit
def _best_groups(maxima, num_groups, max_groups, want, groups, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """Write the ids of the `want` best groups to `groups`, ascending.

    Returns a key that all their maxima reach, and the highest of all.
    """
    tile = _load_keys(maxima, 0, num_groups, max_groups, TILE)
    low_tile = tl.where(tile == ABSENT, 2**31 - 1, tile)
    high_tile = tile
    if not ONE_TILE:
        for start in range(TILE, num_groups, TILE):
            more = _load_keys(maxima, start, num_groups, max_groups, TILE)
            low_tile = tl.minimum(low_tile, tl.where(more == ABSENT, 2**31 - 1, more))
            high_tile = tl.maximum(high_tile, more)
    low = tl.min(low_tile)
    highest = tl.max(high_tile)
    high = tl.where(want == num_groups, low, highest)
    threshold, ties = _threshold(tile, maxima, num_groups, max_groups, want, num_groups, low, high, TILE, ONE_TILE)
    if ONE_TILE:
        keep, place = _places(tile, threshold, ties)
        tl.store(groups + place, tl.arange(0, TILE), mask=keep)
    else:
        written = 0
        for start in range(0, num_groups, TILE):
            tile = _load_keys(maxima, start, num_groups, max_groups, TILE)
            keep, place = _places(tile, threshold, ties)
            tl.store(groups + written + place, start + tl.arange(0, TILE), mask=keep)
            ties -= tl.sum((tile == threshold).to(tl.int32))
            written += tl.sum(keep.to(tl.int32))
    return threshold, highest


@triton.jit
def _pick_kernel(
    keys,  # [T, capacity]
    maxima,  # [T, max_groups]
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
    OVERLAP: tl.constexpr,
):
    """Program t: the K best positions of query t, ascending, and the rows they lie in."""
    wait(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    num_tokens = tl.load(positions + t) + 1
    table = block_table + tl.load(sequence + t).to(tl.int64) * table_stride
    num_groups = tl.cdiv(num_tokens, GROUP)
    num_kept = tl.minimum(num_groups, K)
    own_groups = groups + t * K
    own_maxima = maxima + t * max_groups
    reached, highest = _best_groups(own_maxima, num_groups, max_groups, num_kept, own_groups, MAXIMA_TILE, ONE_TILE)
    tl.debug_barrier()  # other threads read the group ids

    i = tl.arange(0, CHOSEN_TILE // GROUP)
    kept = i < num_kept
    start = tl.load(own_groups + i, mask=kept, other=0) * GROUP  # of each kept group
    token = tl.arange(0, GROUP)[None, :]
    key = tl.load(keys + t * capacity + start[:, None] + token, mask=kept[:, None], other=ABSENT)
    row = tl.load(table + start // PAGE, mask=kept, other=0) * PAGE + start % PAGE
    key = tl.reshape(key, [CHOSEN_TILE])
    want = tl.minimum(num_tokens, K)
    low = tl.where(num_kept == K, reached, _LOWEST)  # K groups have a token that reaches it
    high = tl.where(want == num_tokens, low, highest)
    reach_low = tl.sum((key >= low).to(tl.int32))
    threshold, ties = _threshold(key, keys, 0, 0, want, reach_low, low, high, CHOSEN_TILE, True)
    keep, place = _places(key, threshold, ties)
    keep = tl.reshape(keep, [CHOSEN_TILE // GROUP, GROUP])
    place = tl.reshape(place, [CHOSEN_TILE // GROUP, GROUP])
    place = tl.max_contiguous(tl.multiple_of(place, (1, 4)), (1, 4))  # as in _places
    tl.store(chosen_positions + t * K + place, start[:, None] + token, mask=keep)
    tl.store(chosen_rows + t * K + place, row[:, None] + token, mask=keep)
    rest = tl.arange(0, BLOCK_K)
    unused = (rest >= want) & (rest < K)
    nothing = tl.full([BLOCK_K], -1, tl.int32)
    tl.store(chosen_positions + t * K + rest, nothing, mask=unused)
    tl.store(chosen_rows + t * K + rest, nothing, mask=unused)
    tl.store(lengths + t, want)


def pick(keys: Tensor, maxima: Tensor, queries: Queries, k: int, tiles: SelectTiles) -> Selection:
    """The selection that `score_keys` prepared, with the same tiles."""
    num_queries, capacity = keys.shape
    device = limits(keys.device)
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
        OVERLAP=device.early_launch,
        num_warps=tiles.pick_warps,
        **launch_options(device),
    )
    return Selection(chosen, rows, lengths)
