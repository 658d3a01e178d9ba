"""Index scores of many queries of a sequence: each page of keys is read once for a tile of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Queries
from clsa_cuda.kernels.float8 import widened
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.prefill import load_tile, query_tiles
from clsa_cuda.kernels.search import ABSENT, keys_of
from clsa_cuda.kernels.tiles import limits
from clsa_cuda.plain import FLOAT8

_PROGRAMS = 4  # of each multiprocessor, at least, if there are pages for them
_LARGEST_DIM = 256


@launcher
@triton.jit
def _score_kernel(
    q_idx,  # [T, I]
    k_idx,  # [N, I]
    positions,  # [T]
    block_table,  # [B, M]
    tiles,  # [n, 4]
    keys,  # [T, capacity] out
    maxima,  # [T, capacity / GROUP] out
    q_stride,
    k_stride,
    table_stride,
    capacity,
    max_groups,
    I: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (tile, split): the scores of a run of pages for the queries of a tile.

    A score is one product over all of I, and the shape of the product never changes, so that it does not depend on
    which chunk or tile a query is in.
    """
    sequence, start, token, _, there = load_tile(tiles, 1, BLOCK_M)
    t = start + token
    last = tl.load(positions + t, mask=there, other=-1)
    d = tl.arange(0, I)
    q = tl.load(q_idx + t[:, None] * q_stride + d[None, :], mask=(last >= 0)[:, None], other=0.0)
    table = block_table + sequence * table_stride
    num_pages = (tl.max(last) + PAGE) // PAGE
    per_split = tl.cdiv(num_pages, tl.num_programs(1))
    first = tl.program_id(1) * per_split
    stop = tl.minimum(first + per_split, num_pages)
    offset = tl.arange(0, PAGE)
    group = tl.arange(0, PAGE // GROUP)
    for page in tl.range(first, stop, num_stages=STAGES):
        row = tl.load(table + page).to(tl.int64) * PAGE + offset
        k = widened(tl.load(k_idx + row[:, None] * k_stride + d[None, :]), q)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        i = page * PAGE + offset
        key = tl.where(i[None, :] <= last[:, None], keys_of(scores), ABSENT)
        seen = (page * PAGE <= last)[:, None]
        tl.store(keys + t[:, None] * capacity + i[None, :], key, mask=seen)
        highest = tl.max(tl.reshape(key, [BLOCK_M, PAGE // GROUP, GROUP]), axis=2)
        j = page * (PAGE // GROUP) + group
        tl.store(maxima + t[:, None] * max_groups + j[None, :], highest, mask=seen)


def takes(index_dim: int) -> bool:
    """Whether `score_many` has a tile for this index head dim."""
    return 16 <= index_dim <= _LARGEST_DIM and index_dim & (index_dim - 1) == 0


def shape_of(itemsize: int) -> tuple[int, int, int]:
    """Queries of a tile, warps and pipeline depth: of the dtype alone, so that a score never depends on its chunk."""
    return (16, 4, 1) if itemsize == 4 else (128, 8, 3)


def score_many(
    q_idx: Tensor, k_idx: Tensor, queries: Queries, group: int, shape: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """`select.score_keys` for several queries of a sequence: keys [T, capacity] and maxima [T, capacity / group].

    Args: q_idx [T, I], k_idx [N, I] of its dtype or E4M3, I as `takes` says; a `shape` other than that of
    `shape_of` is for measuring.
    """
    num_queries, index_dim = q_idx.shape
    table = queries.block_table
    capacity = table.shape[1] * PAGE_SIZE
    assert takes(index_dim) and k_idx.dtype in (q_idx.dtype, FLOAT8) and queries.cu_seqlens[-1] == num_queries
    assert q_idx.stride(1) == k_idx.stride(1) == table.stride(1) == 1 and queries.positions.is_contiguous()
    block_m, num_warps, num_stages = shape or shape_of(q_idx.itemsize)
    tiles = query_tiles(queries.cu_seqlens, 1, block_m, q_idx.device)
    keys = torch.empty(num_queries, capacity, dtype=torch.int32, device=q_idx.device)
    maxima = torch.empty(num_queries, capacity // group, dtype=torch.int32, device=q_idx.device)
    if num_queries == 0:
        return keys, maxima
    wanted = -(-_PROGRAMS * limits(q_idx.device).sm_count // tiles.shape[0])
    _score_kernel[tiles.shape[0], max(1, min(wanted, table.shape[1]))](
        q_idx,
        k_idx,
        queries.positions,
        table,
        tiles,
        keys,
        maxima,
        q_idx.stride(0),
        k_idx.stride(0),
        table.stride(0),
        capacity,
        maxima.shape[1],
        I=index_dim,
        PAGE=PAGE_SIZE,
        GROUP=group,
        BLOCK_M=block_m,
        STAGES=num_stages,
        num_warps=num_warps,
    )
    return keys, maxima
