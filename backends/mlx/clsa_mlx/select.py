"""Exact top-k of the index scores: no threshold, no ties left to chance, no host.

Decode steps that choose single tokens go to the Metal kernels; what chooses blocks, and chunks of a prompt, whose
queries share the keys of their sequence, are plain MLX.
"""

from __future__ import annotations

import mlx.core as mx

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries, Selection
from clsa_mlx import kernels
from clsa_mlx.attention import sequence_rows
from clsa_mlx.blocks import after, blocks, join, spans
from clsa_mlx.kernels.select import select as launch_select
from clsa_mlx.state import widened

_NOWHERE = 2**31 - 1  # sorts behind every position
_UNSEEN = -(2**63)  # sorts below the key of every score


def select(q_idx: mx.array, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
    assert memory.k_idx is not None
    seen_tokens = queries.block_table.shape[1] * PAGE_SIZE
    if seen_tokens <= k:  # everything visible is chosen, whatever the scores
        positions = mx.broadcast_to(mx.arange(k, dtype=mx.int32), (q_idx.shape[0], k))
    elif queries.one_each and block_size == 1 and kernels.enabled:
        return launch_select(q_idx, memory, queries, k)
    elif queries.one_each:
        pages = queries.block_table[queries.sequence]
        positions = _best(_paged_scores(q_idx, memory.k_idx, pages), queries.positions, k, block_size)
    else:
        positions = _best_of_chunks(q_idx, memory.k_idx, queries, k, block_size)
    return _selection(positions, queries)


def take_selection(selection: Selection, rows: mx.array) -> Selection:
    return Selection(selection.positions[rows], selection.rows[rows], selection.lengths[rows])


def _best_of_chunks(q: mx.array, k_idx: mx.array, queries: Queries, k: int, block_size: int) -> mx.array:
    """Like `_best`, for queries that share the keys of their sequence: [T, I], [N, I] -> [T, k]."""
    parts: list[mx.array] = []
    for b, start, stop in spans(queries):
        keys = widened(k_idx[after(parts, sequence_rows(queries, b))], mx.float32)  # [S, I]
        for first, last in blocks(start, stop, 16 * keys.shape[0]):
            scores = after(parts, q[first:last]).astype(mx.float32) @ keys.T
            parts.append(_best(scores, queries.positions[first:last], k, block_size))
    return join(parts)


def largest(scores: mx.array, count: int, seen: mx.array | None = None) -> mx.array:
    """Keys of the `count` largest scores of each row, in no order: [T, S] float32 -> [T, count] int64.

    A key holds a score and its place, so that no two are equal: NaN counts as -inf, equal scores rank by lower
    place. `key_places` reads the places back; a place not `seen` [T, S] ranks below all and gives _NOWHERE.
    """
    scores = mx.where(mx.isnan(scores), -mx.inf, scores) + 0.0  # -0 and +0 are equal
    bits = scores.view(mx.int32)
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ascends with the score
    keys = (ordered.astype(mx.int64) << 32) - mx.arange(scores.shape[1], dtype=mx.int64)
    if seen is not None:
        keys = mx.where(seen, keys, mx.array(_UNSEEN, mx.int64))
    rest = scores.shape[1] - count
    return mx.partition(keys, rest, axis=1)[:, rest:] if 0 < rest < scores.shape[1] else keys[:, rest:]


def key_places(keys: mx.array) -> mx.array:
    """Where the scores of these keys stood: int64 -> int32."""
    places = (-keys & 0xFFFFFFFF).astype(mx.int32)
    return mx.where(keys == mx.array(_UNSEEN, mx.int64), _NOWHERE, places)


def _best(scores: mx.array, last: mx.array, k: int, block_size: int) -> mx.array:
    """Ascending positions of the k best up to and including `last` [T]: [T, S] -> [T, k], _NOWHERE at the end."""
    num_rows, length = scores.shape
    places = mx.arange(length, dtype=mx.int32)
    seen = places <= last[:, None]
    if block_size > 1:
        num_blocks = -(-length // block_size)
        scores = mx.where(seen & ~mx.isnan(scores), scores, -mx.inf)
        scores = mx.pad(scores, [(0, 0), (0, num_blocks * block_size - length)], constant_values=-mx.inf)
        scores = scores.reshape(num_rows, num_blocks, block_size).max(axis=2)
        seen = places[:num_blocks] * block_size <= last[:, None]
    count = min(k // block_size, scores.shape[1])
    chosen = mx.sort(key_places(largest(scores, count, seen)), axis=1)
    if block_size > 1:
        # _NOWHERE times the block size would wrap around to a position.
        starts = mx.where(chosen == _NOWHERE, _NOWHERE - block_size, chosen * block_size)
        chosen = (starts[:, :, None] + mx.arange(block_size, dtype=mx.int32)).reshape(num_rows, -1)
    return mx.pad(chosen, [(0, 0), (0, k - chosen.shape[1])], constant_values=_NOWHERE)


def _selection(positions: mx.array, queries: Queries) -> Selection:
    """Cut off what a query does not see, and look the rest up in the page table."""
    seen = positions <= queries.positions[:, None]
    positions = mx.where(seen, positions, -1)
    pages = mx.take_along_axis(queries.block_table[queries.sequence], mx.maximum(positions, 0) // PAGE_SIZE, axis=1)
    rows = mx.where(seen, pages * PAGE_SIZE + positions % PAGE_SIZE, -1)
    return Selection(positions, rows, seen.sum(axis=1).astype(mx.int32))


def _paged_scores(q: mx.array, k_idx: mx.array, pages: mx.array) -> mx.array:
    """Scores of whole pages: [T, I], [N, I], [T, M] page ids (-1: any score) -> [T, M * P] float32."""
    num_queries, num_pages = pages.shape
    keys = k_idx.reshape(-1, PAGE_SIZE, k_idx.shape[1])  # [N / P, P, I]
    pages = mx.maximum(pages, 0)
    if k_idx.dtype == mx.float32:  # reads the pages where they lie
        queries = mx.broadcast_to(mx.arange(num_queries, dtype=mx.uint32)[:, None], pages.shape)
        scores = mx.gather_mm(q.astype(mx.float32)[:, None], keys.swapaxes(1, 2), queries, pages.astype(mx.uint32))
        return scores.reshape(num_queries, -1)
    # Half-precision products would come back rounded to half precision, full of ties that are none.
    q = q.astype(mx.float32)[:, None]
    parts: list[mx.array] = []
    for first, last in blocks(0, num_pages, 4 * num_queries * PAGE_SIZE * k_idx.shape[1]):
        some = widened(keys[after(parts, pages[:, first:last])], mx.float32)
        parts.append(q @ some.reshape(num_queries, -1, k_idx.shape[1]).swapaxes(1, 2))
    return join(parts, axis=2)[:, 0]
