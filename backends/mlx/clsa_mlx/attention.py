"""GQA attention over selected rows, over everything, and over a window, in plain MLX and by Metal kernels.

The kernels take the decode steps of heads that they can hold (`has_kernel`); all else is plain MLX.
"""

from __future__ import annotations

import weakref

import mlx.core as mx

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries, Selection, Window
from clsa_mlx import kernels
from clsa_mlx.blocks import BLOCK_BYTES, after, blocks, join, spans
from clsa_mlx.fused import on_gpu
from clsa_mlx.kernels.attend import has_kernel
from clsa_mlx.kernels.gather_attention import gather_attention as launch_gather_attention
from clsa_mlx.state import gathered, widened, zero_row


def gather_attention(q: mx.array, memory: Memory, selection: Selection) -> mx.array:
    if kernels.enabled and has_kernel(q, memory.k):
        return launch_gather_attention(q, memory, selection)
    rows = selection.rows
    if _bytes_per_query(memory, rows) * q.shape[0] > BLOCK_BYTES:
        return _attend_rows(q, memory, rows)
    keys, values = _gathered_once(memory, rows, q.dtype)
    return _attend(q[:, :, None], keys, values, rows[:, None] >= 0)[:, :, 0]


def _gathered_once(memory: Memory, rows: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """K and V of selected rows, side by side: all layers that share a memory and a selection share them too."""
    key = id(memory.k), id(memory.v), id(rows)
    if key not in gathered:
        gathered.clear()
        keys, values = (widened(_gather_heads(x, rows), dtype) for x in (memory.k, memory.v))
        gathered[key] = keys, values
        weakref.finalize(rows, gathered.pop, key, None)
    return gathered[key]


def dense_attention(q: mx.array, memory: Memory, queries: Queries) -> mx.array:
    if queries.one_each:
        return _attend_rows(q, memory, _visible_rows(queries))
    parts: list[mx.array] = []
    for b, start, stop in spans(queries):
        rows = after(parts, sequence_rows(queries, b))
        keys, values = (widened(_gather_heads(x, rows[None]), q.dtype) for x in (memory.k, memory.v))
        places = mx.arange(rows.shape[0], dtype=mx.int32)
        for first, last in blocks(start, stop, 4 * q.shape[1] * rows.shape[0]):
            mask = places <= queries.positions[first:last, None]
            parts.append(_attend_chunk(after(parts, q[first:last]), keys, values, mask))
    return join(parts)


def sliding_attention(q: mx.array, k: mx.array, v: mx.array, window: Window, queries: Queries) -> mx.array:
    if queries.one_each:
        return _sliding_decode(q, k, v, window, queries)
    size = window.size
    longest = max(size, 128)  # queries of a block: about as many as each of them sees
    v = mx.where(queries.positions[:, None, None] >= 0, v, 0)  # a padded row may hold anything
    parts: list[mx.array] = []
    for b, start, stop in spans(queries):
        before = min(size, queries.context_lens[b])  # tokens in front of the chunk, at most
        ring = queries.positions[start] - before + mx.arange(before, dtype=mx.int32)
        rows = mx.where(ring >= 0, queries.window_slots[b] * size + ring % size, -1)
        keys = join([_gather_heads(window.k, rows[None]), k[None, start:stop].swapaxes(1, 2)], axis=2)
        values = join([_gather_heads(window.v, rows[None]), v[None, start:stop].swapaxes(1, 2)], axis=2)
        places = join([ring, queries.positions[start:stop]])  # of keys and values, [before + n]
        for first, last in blocks(start, stop, 4 * q.shape[1] * (size + longest), at_most=longest):
            # A block needs the size - 1 tokens before it and its own.
            near = slice(max(0, before + first - start - size + 1), before + last - start)
            place, position = places[near], queries.positions[first:last, None]
            mask = (place >= 0) & (place <= position) & (place > position - size)
            own = after(parts, q[first:last])
            parts.append(_attend_chunk(own, keys[:, :, near], values[:, :, near], mask))
    return join(parts)


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


def sequence_rows(queries: Queries, sequence: int) -> mx.array:
    """Physical rows of all positions of one sequence: [S]."""
    length = queries.context_lens[sequence]
    pages = queries.block_table[sequence, : -(-length // PAGE_SIZE)]
    return (pages[:, None] * PAGE_SIZE + mx.arange(PAGE_SIZE, dtype=mx.int32)).reshape(-1)[:length]


def _visible_rows(queries: Queries) -> mx.array:
    """Physical row of every position that a query sees, -1 beyond: [T, M * P]."""
    pages = queries.block_table[queries.sequence]  # [T, M]
    rows = (pages[:, :, None] * PAGE_SIZE + mx.arange(PAGE_SIZE, dtype=mx.int32)).reshape(pages.shape[0], -1)
    return mx.where(mx.arange(rows.shape[1], dtype=mx.int32) <= queries.positions[:, None], rows, -1)


def _attend_rows(q: mx.array, memory: Memory, rows: mx.array) -> mx.array:
    """Every query over rows of its own, -1 is none: [T, H, D], [T, S] -> [T, H, D]."""
    parts: list[mx.array] = []
    for first, last in blocks(0, q.shape[0], _bytes_per_query(memory, rows)):
        own = after(parts, rows[first:last])
        keys, values = (widened(_gather_heads(x, own), q.dtype) for x in (memory.k, memory.v))
        parts.append(_attend(q[first:last, :, None], keys, values, own[:, None] >= 0)[:, :, 0])
    return join(parts)


def _bytes_per_query(memory: Memory, rows: mx.array) -> int:
    """Of the keys that a query reads, or the values, in float32."""
    _, kv_heads, head_dim = memory.k.shape
    return int(4 * rows.shape[1] * kv_heads * head_dim)


def _gather_heads(x: mx.array, rows: mx.array) -> mx.array:
    """Rows of each KV head, contiguous for the products that follow: [N, G, D], [B, S] -> [B, G, S, D].

    -1 reads the zero row.
    """
    num_rows, heads, head_dim = x.shape
    rows = mx.where(rows < 0, zero_row(x), rows)
    indices = rows[:, None, :] * heads + mx.arange(heads, dtype=mx.int32)[:, None]
    return x.reshape(num_rows * heads, head_dim)[indices]


def _attend_chunk(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """Queries of one sequence: [T, H, D], [1, G, S, D] twice, [T, S] bool -> [T, H, D]."""
    return _attend(q[None].swapaxes(1, 2), k, v, mask[None])[0].swapaxes(0, 1)


def _attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """[B, H, T, D], [B, G, S, D] twice, [B, T, S] bool -> [B, H, T, D]; zeros where a row of the mask is empty."""
    dtype = q.dtype
    if not _has_kernel(q.shape, k.shape):
        # Composed of other ops, MLX's attention would round the scores to the type of its inputs.
        q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask[:, None])
    return mx.where(mask.any(axis=-1)[:, None, :, None], out.astype(dtype), 0)


def _has_kernel(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> bool:
    """Whether MLX has a kernel for these shapes; it keeps scores and softmax in float32."""
    _, heads, length, head_dim = q_shape
    if not on_gpu() or head_dim not in (64, 96, 128):
        return False
    return length > 8 or (length <= k_shape[2] and length * heads // k_shape[1] <= 32)
