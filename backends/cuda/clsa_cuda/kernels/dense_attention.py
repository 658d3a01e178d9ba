"""`dense_attention` of a decode step: every visible row, page after page."""

from __future__ import annotations

from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries
from clsa_cuda.kernels.attend_rows import attend_rows
from clsa_cuda.kernels.tiles import AttentionTiles, attention_tiles, limits


def dense_attention(q: Tensor, memory: Memory, queries: Queries, tiles: AttentionTiles | None = None) -> Tensor:
    """`Ops.dense_attention`; each query reads its whole sequence, so this is for decode steps."""
    num_queries, _, head_dim = q.shape
    kv_heads, max_keys = memory.k.shape[1], queries.block_table.shape[1] * PAGE_SIZE
    itemsize = q.itemsize if q.itemsize == 4 else memory.k.itemsize
    tiles = tiles or attention_tiles(num_queries, kv_heads, max_keys, head_dim, itemsize, limits(q.device))
    kv = (memory.k, memory.v)
    table, positions = queries.block_table, queries.positions
    # Not fresh, whoever made the keys: only positions and the page table are read ahead, and no kernel makes those.
    return attend_rows("pages", PAGE_SIZE, q, kv, None, table, positions, queries.sequence, tiles, fresh=False)
