"""`dense_attention` of a decode step: every visible row, page after page."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries
from clsa_cuda.kernels.attend_pages import _attend_pages_kernel
from clsa_cuda.kernels.attend_rows import check_inputs, in_words
from clsa_cuda.kernels.merge import merged
from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters
from clsa_cuda.kernels.tiles import ContextTiles, cdiv, context_tiles, launch_options, limits, next_power_of_2


def dense_attention(q: Tensor, memory: Memory, queries: Queries, tiles: ContextTiles | None = None) -> Tensor:
    """`Ops.dense_attention`; each query reads its whole sequence, so this is for decode steps.

    It may be launched early whoever made the keys: what is read before the wait no kernel makes. `tiles` is for
    measuring others.
    """
    num_queries, num_heads, head_dim = q.shape
    out = torch.empty(num_queries, num_heads, head_dim, dtype=q.dtype, device=q.device)
    if num_queries == 0:
        return out
    k, v = memory.k, memory.v
    table, positions = queries.block_table, queries.positions
    check_inputs(q, (k, v), table, positions)
    kv_heads, device = k.shape[1], limits(q.device)
    pairs, repeat = num_queries * kv_heads, num_heads // kv_heads
    itemsize = q.itemsize if q.itemsize == 4 else k.itemsize
    tiles = tiles or context_tiles(pairs, head_dim, itemsize, device)
    assert tiles.programs <= MAX_ARRIVALS
    words = in_words(q, (k, v))
    if words:
        k, v = (x.view(torch.int16) for x in (k, v))
    _attend_pages_kernel[(tiles.programs,)](
        q,
        k,
        v,
        table,
        positions,
        queries.sequence,
        out,
        torch.empty(repeat, 2 * tiles.programs, head_dim, dtype=torch.float32, device=q.device),
        torch.empty(repeat, 2 * tiles.programs, dtype=torch.float32, device=q.device),
        arrival_counters(q.device),
        num_queries,
        num_heads,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        table.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        D=head_dim,
        BLOCK_D=max(32 if words else 16, next_power_of_2(head_dim)),  # products are over 16 numbers at least
        REPEAT=repeat,
        KV_HEADS=kv_heads,
        BLOCK_H=max(16, next_power_of_2(repeat)),
        BLOCK_N=tiles.block_n,
        BLOCK_T=next_power_of_2(num_queries),
        PAGE=PAGE_SIZE,
        STAGES=tiles.num_stages,
        MERGED=merged(cdiv(tiles.programs, pairs), tiles.programs, repeat, head_dim, tiles.num_warps, device.sm_count),
        WORDS=words,
        NATIVE=q.is_cuda,
        OVERLAP=device.early_launch,
        num_warps=tiles.num_warps,
        **launch_options(device),
    )
    return out
