"""Causal attention over every visible row of a memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries
from clsa_cuda.attention import MAX_QUERIES, attend, block_length
from clsa_cuda.state import page_rows, zero_row


def dense_attention(q: Tensor, memory: Memory, queries: Queries) -> Tensor:
    if queries.one_each:
        # The width of the table, not the context lengths: it does not change from step to step.
        table = queries.block_table[queries.sequence.long()]
        blocks = _blocks(memory, table, queries.positions[:, None], table.shape[1] * PAGE_SIZE, q.shape[1])
        return attend(q[:, None], blocks)[:, 0]
    out = torch.zeros_like(q)
    bounds = zip(queries.cu_seqlens, queries.cu_seqlens[1:], queries.context_lens, strict=False)
    for b, (first, last, context_len) in enumerate(bounds):
        table = queries.block_table[b : b + 1]
        for start in range(first, last, MAX_QUERIES):
            rows = slice(start, min(start + MAX_QUERIES, last))
            blocks = _blocks(memory, table, queries.positions[None, rows], context_len, q.shape[1])
            out[rows] = attend(q[None, rows], blocks)[0]
    return out


def _blocks(
    memory: Memory, table: Tensor, positions: Tensor, context_len: int, num_heads: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of keys for `attend`: table [n, M], positions [n, Q]."""
    n, num_queries = positions.shape
    bytes_per_key = 4 * n * max(num_queries * num_heads, memory.k[0].numel())
    size = block_length(bytes_per_key, max(1, context_len))
    highest = positions.amax(1, keepdim=True)
    for start in range(0, context_len, size):
        keys = torch.arange(start, min(start + size, context_len), device=table.device)
        rows = page_rows(table, keys, keys <= highest, zero_row(memory.k))
        yield memory.k[rows], memory.v[rows], keys <= positions[..., None]
