"""GQA attention over selected rows, over everything, and over a window, in plain MLX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries, Selection, Window
from clsa_mlx.blocks import block_len, in_turn, ranges
from clsa_mlx.fused import on_gpu
from clsa_mlx.state import zero_row

After = Callable[[mx.array], mx.array]


def gather_attention(q: mx.array, memory: Memory, selection: Selection) -> mx.array:
    return _attend_rows(q, memory.k, memory.v, selection.rows)


def dense_attention(q: mx.array, memory: Memory, queries: Queries) -> mx.array:
    if queries.one_each:
        return _attend_rows(q, memory.k, memory.v, visible_rows(queries))
    return in_turn(_dense_blocks(q, memory, queries))


def sliding_attention(q: mx.array, k: mx.array, v: mx.array, window: Window, queries: Queries) -> mx.array:
    if queries.one_each:
        return _sliding_decode(q, k, v, window, queries)
    return in_turn(_sliding_blocks(q, k, v, window, queries))


def visible_rows(queries: Queries) -> mx.array:
    """Physical row of every position that a query sees, -1 beyond: [T, M * P]."""
    pages = queries.block_table[queries.sequence]  # [T, M]
    rows = (pages[:, :, None] * PAGE_SIZE + mx.arange(PAGE_SIZE, dtype=mx.int32)).reshape(pages.shape[0], -1)
    return mx.where(mx.arange(rows.shape[1], dtype=mx.int32) <= queries.positions[:, None], rows, -1)


def sequence_rows(queries: Queries, sequence: int) -> mx.array:
    """Physical rows of all positions of one sequence: [S]."""
    length = queries.context_lens[sequence]
    pages = queries.block_table[sequence, : -(-length // PAGE_SIZE)]
    return (pages[:, None] * PAGE_SIZE + mx.arange(PAGE_SIZE, dtype=mx.int32)).reshape(-1)[:length]


def _attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """[B, H, T, D], [B, G, S, D] twice, [B, T, S] bool -> [B, H, T, D]; zeros where a row of the mask is empty."""
    out_dtype = q.dtype
    if not _is_fused(q.shape, k.shape):
        # The composed form rounds scores to the type of its inputs.
        q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask[:, None])
    return mx.where(mask.any(axis=-1)[:, None, :, None], out.astype(out_dtype), 0)


def _is_fused(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> bool:
    """Whether MLX has a kernel for this that keeps scores and softmax in float32."""
    _, heads, length, head_dim = q_shape
    if not on_gpu() or head_dim not in (64, 96, 128):
        return False
    return length > 8 or (length <= k_shape[2] and length * heads // k_shape[1] <= 32)


def _gather_heads(x: mx.array, rows: mx.array) -> mx.array:
    """Rows of each KV head, contiguous for the products that follow: [N, G, D], [B, S] -> [B, G, S, D].

    -1 reads the zero row.
    """
    num_rows, heads, head_dim = x.shape
    rows = mx.where(rows < 0, zero_row(x), rows)
    indices = rows[:, None, :] * heads + mx.arange(heads, dtype=mx.int32)[:, None]
    return x.reshape(num_rows * heads, head_dim)[indices]


def _attend_rows(q: mx.array, k: mx.array, v: mx.array, rows: mx.array) -> mx.array:
    """Every query over rows of its own, -1 is none: [T, H, D], [N, G, D] twice, [T, S] -> [T, H, D]."""
    itemsize = k.dtype.size if _is_fused((1, q.shape[1], 1, q.shape[2]), (1, k.shape[1], 1)) else 4
    block = block_len(rows.shape[1] * k.shape[1] * k.shape[2] * itemsize)

    def attend(start: int, stop: int, after: After) -> mx.array:
        own = after(rows[start:stop])
        keys, values = _gather_heads(k, own), _gather_heads(v, own)
        return _attend(q[start:stop, :, None], keys, values, own[:, None] >= 0)[:, :, 0]

    return in_turn(partial(attend, *limits) for limits in ranges(0, q.shape[0], block))


def _dense_blocks(q: mx.array, memory: Memory, queries: Queries) -> Iterator[Callable[[After], mx.array]]:
    for b, (start, stop) in enumerate(zip(queries.cu_seqlens, queries.cu_seqlens[1:], strict=False)):
        if start == stop:
            continue
        length = queries.context_lens[b]
        block = block_len(4 * q.shape[1] * length)

        def attend(b: int, first: int, last: int, length: int, after: After) -> mx.array:
            rows = after(sequence_rows(queries, b))[None]
            keys, values = _gather_heads(memory.k, rows), _gather_heads(memory.v, rows)
            mask = mx.arange(length, dtype=mx.int32) <= queries.positions[first:last, None]
            return _attend(q[None, first:last].swapaxes(1, 2), keys, values, mask[None])[0].swapaxes(0, 1)

        yield from (partial(attend, b, *limits, length) for limits in ranges(start, stop, block))


def _sliding_decode(q: mx.array, k: mx.array, v: mx.array, window: Window, queries: Queries) -> mx.array:
    """One token per sequence: its ring, with the token itself put where it will be written."""
    positions = queries.positions[:, None]
    offsets = mx.arange(window.size, dtype=mx.int32)
    slots = queries.window_slots[queries.sequence][:, None]
    # Until the ring is full, its offsets are the positions; later the token takes the place of the oldest.
    rows = mx.where(offsets < positions, slots * window.size + offsets, -1)  # [T, W]
    own = (offsets == positions % window.size)[:, None, :, None]
    keys = mx.where(own, k[:, :, None], _gather_heads(window.k, rows))
    values = mx.where(own, v[:, :, None], _gather_heads(window.v, rows))
    return _attend(q[:, :, None], keys, values, (offsets <= positions)[:, None])[:, :, 0]


def _sliding_blocks(
    q: mx.array, k: mx.array, v: mx.array, window: Window, queries: Queries
) -> Iterator[Callable[[After], mx.array]]:
    """A chunk per sequence, in blocks of queries: a block needs the W - 1 tokens before it and its own."""
    size = window.size
    v = mx.where(queries.positions[:, None, None] >= 0, v, 0)  # a padded row may hold anything
    block = min(max(size, 128), block_len(4 * q.shape[1] * (size + max(size, 128))))
    for b, (start, stop) in enumerate(zip(queries.cu_seqlens, queries.cu_seqlens[1:], strict=False)):
        if start == stop:
            continue
        before = min(size, queries.context_lens[b])  # ring tokens in front of the chunk, at most
        ring = queries.positions[start] - before + mx.arange(before, dtype=mx.int32)
        rows = mx.where(ring >= 0, queries.window_slots[b] * size + ring % size, -1)[None]
        keys, values = (
            mx.concatenate([_gather_heads(old, rows), new[None, start:stop].swapaxes(1, 2)], axis=2)
            for old, new in ((window.k, k), (window.v, v))
        )  # [1, G, before + n, D]
        seen = mx.concatenate([ring, queries.positions[start:stop]])

        def attend(
            first: int, last: int, low: int, high: int, keys: mx.array, values: mx.array, seen: mx.array, after: After
        ) -> mx.array:
            own = after(queries.positions[first:last, None])
            near = seen[low:high]
            mask = (near >= 0) & (near <= own) & (near > own - size)
            out = _attend(
                after(q[None, first:last].swapaxes(1, 2)), keys[:, :, low:high], values[:, :, low:high], mask[None]
            )
            return out[0].swapaxes(0, 1)

        for first, last in ranges(start, stop, block):
            low = max(0, before + first - start - size + 1)
            high = before + last - start
            yield partial(attend, first, last, low, high, keys, values, seen)
