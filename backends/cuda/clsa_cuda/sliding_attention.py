"""Sliding-window attention: the ring holds what came before the chunk, the chunk brings its own keys."""

from __future__ import annotations

import torch
from torch import Tensor

from clsa.ops import Queries, Window
from clsa_cuda.attention import MAX_QUERIES, attend, block_length
from clsa_cuda.state import zero_row


def sliding_attention(q: Tensor, k: Tensor, v: Tensor, window: Window, queries: Queries) -> Tensor:
    # A padded row may hold anything, and a weight of 0 does not silence a NaN.
    padded = queries.positions < 0
    k, v = (x.masked_fill(padded[:, None, None], 0) for x in (k, v))
    if queries.one_each:
        slots = queries.window_slots[queries.sequence.long()]
        return _chunk(q[:, None], k[:, None], v[:, None], window, queries.positions[:, None], slots)[:, 0]
    out = torch.zeros_like(q)
    bounds = zip(queries.cu_seqlens, queries.cu_seqlens[1:], strict=False)
    for b, (first, last) in enumerate(bounds):
        if first < last:
            rows, slots = slice(first, last), queries.window_slots[b : b + 1]
            positions = queries.positions[None, rows]
            out[rows] = _chunk(q[None, rows], k[None, rows], v[None, rows], window, positions, slots)[0]
    return out


def _chunk(q: Tensor, k: Tensor, v: Tensor, window: Window, positions: Tensor, slots: Tensor) -> Tensor:
    """n chunks of T consecutive tokens: q [n, T, H, D], k, v [n, T, G, D], positions [n, T], slots [n]."""
    n, length, num_heads, _ = q.shape
    before = torch.arange(1 - window.size, 0, device=q.device) + positions[:, :1]  # [n, W - 1], all in the ring
    rows = slots[:, None].long() * window.size + before % window.size
    rows = torch.where(before >= 0, rows, zero_row(window.k))
    k = torch.cat([window.k[rows].to(k.dtype), k], dim=1)  # [n, W - 1 + T, G, D]
    v = torch.cat([window.v[rows].to(v.dtype), v], dim=1)
    key_positions = torch.cat([before, positions], dim=1)
    # Query i sees keys i to i + W - 1 of these, so a block as long as the window reads at most twice what it needs.
    longest = min(MAX_QUERIES, max(window.size, 64))
    size = block_length(4 * n * num_heads * (longest + window.size), longest)
    parts = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        keys = slice(start, stop + window.size - 1)
        distance = positions[:, start:stop, None] - key_positions[:, None, keys]
        visible = (distance >= 0) & (distance < window.size) & (key_positions[:, None, keys] >= 0)
        parts.append(attend(q[:, start:stop], [(k[:, keys], v[:, keys], visible)]))
    return torch.cat(parts, dim=1)
