"""Routing and attention: which rows a query reads, and what it makes of them."""

from __future__ import annotations

import numpy as np

from clsa.config import PAGE_SIZE
from clsa.ops import Array, HeadNorms, Memory, Queries, Selection, Window
from clsa.spec.arrays import wide
from clsa.spec.layers import norm_rope
from clsa.spec.state import write_window


def physical_rows(queries: Queries, sequence: int, positions: Array) -> Array:
    """Where the given positions of a sequence lie in a memory."""
    pages = queries.block_table[sequence, positions // PAGE_SIZE]
    return pages * PAGE_SIZE + positions % PAGE_SIZE


def top_k(scores: Array, k: int, block_size: int) -> Array:
    """Ascending positions of the best: [S] -> [<= k]. NaN counts as -inf, ties go to the lower position."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    num_blocks = -(-len(scores) // block_size)
    padded = np.full(num_blocks * block_size, -np.inf)
    padded[: len(scores)] = scores
    best = padded.reshape(num_blocks, block_size).max(axis=1)
    chosen = np.sort(np.argsort(-best, kind="stable")[: k // block_size])
    positions = (chosen[:, None] * block_size + np.arange(block_size)).reshape(-1)
    return positions[positions < len(scores)]


def select(q_idx: Array, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
    assert memory.k_idx is not None
    num_queries = len(q_idx)
    positions = np.full((num_queries, k), -1, np.int32)
    rows = np.full((num_queries, k), -1, np.int32)
    lengths = np.zeros(num_queries, np.int32)
    for t, (position, sequence) in enumerate(zip(queries.positions, queries.sequence, strict=True)):
        visible = physical_rows(queries, sequence, np.arange(position + 1))
        chosen = top_k(wide(memory.k_idx[visible]) @ q_idx[t], k, block_size)
        lengths[t] = len(chosen)
        positions[t, : len(chosen)] = chosen
        rows[t, : len(chosen)] = visible[chosen]
    return Selection(positions, rows, lengths)


def take_selection(selection: Selection, rows: Array) -> Selection:
    return Selection(selection.positions[rows], selection.rows[rows], selection.lengths[rows])


def attend(q: Array, k: Array, v: Array) -> Array:
    """One query over what it sees: [H, D], [S, G, D] twice -> [H, D]. Head h reads KV head h // (H / G)."""
    num_heads, head_dim = q.shape
    if len(k) == 0:
        return np.zeros_like(q)
    k = np.repeat(k, num_heads // k.shape[1], axis=1)  # [S, H, D]
    v = np.repeat(v, num_heads // v.shape[1], axis=1)
    scores = np.einsum("hd,shd->hs", q, k) / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), v)


def gather_attention(q: Array, memory: Memory, selection: Selection) -> Array:
    out = np.zeros_like(q)
    for t, length in enumerate(selection.lengths):
        rows = selection.rows[t, :length]
        out[t] = attend(q[t], wide(memory.k[rows]), wide(memory.v[rows]))
    return out


def dense_attention(q: Array, memory: Memory, queries: Queries) -> Array:
    out = np.zeros_like(q)
    for t, (position, sequence) in enumerate(zip(queries.positions, queries.sequence, strict=True)):
        rows = physical_rows(queries, sequence, np.arange(position + 1))
        out[t] = attend(q[t], wide(memory.k[rows]), wide(memory.v[rows]))
    return out


def sliding_attention(q: Array, k: Array, v: Array, window: Window, queries: Queries) -> Array:
    out = np.zeros_like(q)
    for b, (start, stop) in enumerate(zip(queries.cu_seqlens, queries.cu_seqlens[1:], strict=False)):
        first = queries.positions[start]  # of this chunk; everything before it is in the ring
        for t in range(start, stop):
            position = queries.positions[t]
            if position < 0:
                continue
            oldest = max(0, position - window.size + 1)
            ring = queries.window_slots[b] * window.size + np.arange(oldest, first) % window.size
            chunk = np.arange(start + max(0, oldest - first), t + 1)
            seen_k = np.concatenate([window.k[ring], k[chunk]])
            seen_v = np.concatenate([window.v[ring], v[chunk]])
            out[t] = attend(q[t], seen_k, seen_v)
    return out


def attend_window(
    q: Array, k: Array, v: Array, norms: HeadNorms, window: Window, queries: Queries, ring_mapping: Array
) -> tuple[Array, Window]:
    q = norm_rope(q, norms.q, norms.eps, queries.positions, norms.theta)
    k = norm_rope(k, norms.k, norms.eps, queries.positions, norms.theta)
    return sliding_attention(q, k, v, window, queries), write_window(window, k, v, ring_mapping)
