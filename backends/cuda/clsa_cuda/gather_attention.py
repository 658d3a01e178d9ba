"""Attention over the selected rows (paper, equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from clsa.ops import Memory, Selection
from clsa_cuda.attention import attend, block_length
from clsa_cuda.state import zero_row


def gather_attention(q: Tensor, memory: Memory, selection: Selection) -> Tensor:
    num_queries, num_heads, _ = q.shape
    bytes_per_query = 4 * selection.rows.shape[1] * max(num_heads, memory.k[0].numel())
    size = block_length(bytes_per_query, num_queries)
    parts = []
    for start in range(0, max(1, num_queries), size):
        rows = selection.rows[start : start + size].long()  # [t, K]
        visible = rows >= 0
        rows = torch.where(visible, rows, zero_row(memory.k))
        block = (memory.k[rows], memory.v[rows], visible[:, None])
        parts.append(attend(q[start : start + size, None], [block])[:, 0])
    return torch.cat(parts)
