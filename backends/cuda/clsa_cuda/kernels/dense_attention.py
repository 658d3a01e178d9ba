"""`dense_attention` of a decode step: every visible row, page after page."""

from __future__ import annotations

from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries
from clsa_cuda.kernels.attend_rows import attend_rows
from clsa_cuda.kernels.tiles import AttentionTiles, attention_tiles, limits


def dense_attention(
    q: Tensor, memory: Memory, queries: Queries, tiles: AttentionTiles | None = None, fresh: bool = True
) -> Tensor:
    """`Ops.dense_attention`; each query reads its whole sequence, so this is for decode steps.

    `fresh` False promises that the last launch made nothing but `q` of this: see `attend_rows`.
    """
    num_queries, _, head_dim = q.shape
    max_keys = queries.block_table.shape[1] * PAGE_SIZE
    tiles = tiles or attention_tiles(num_queries, memory.k.shape[1], max_keys, head_dim, q.itemsize, limits(q.device))
    kv = (memory.k, memory.v)
    table, positions = queries.block_table, queries.positions
    return attend_rows("pages", PAGE_SIZE, q, kv, None, table, positions, queries.sequence, tiles, fresh=fresh)
