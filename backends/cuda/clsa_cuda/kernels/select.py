"""`select`: paged index scores and the exact top-k, in two launches.

The first streams K_idx, once for each query or, in `score_many`, for many of a sequence. It writes each score as an
int32 key in the order of scores, and the largest key of every `group` tokens. The second, in `pick`, finds the k best
from them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.errors import BackendError
from clsa.ops import Memory, Queries, Selection
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.overlap import wait
from clsa_cuda.kernels.pick import pick
from clsa_cuda.kernels.prefill import asks_many
from clsa_cuda.kernels.score_many import score_many, takes
from clsa_cuda.kernels.search import ABSENT, keys_of
from clsa_cuda.kernels.tiles import SelectTiles, launch_options, limits, next_power_of_2, select_tiles

# Of the queries that one launch takes: the key of each token, and what `pick` may list of it.
_MAX_SCRATCH_BYTES = 384 << 20


@launcher
@triton.jit
def _score_kernel(
    q_idx,  # [T, I]
    k_idx,  # [N, I]
    positions,  # [T]
    sequence,  # [T]
    block_table,  # [B, M]
    keys,  # [T, capacity] out
    maxima,  # [T, capacity / GROUP] out
    q_stride,
    k_stride,
    table_stride,
    capacity,
    max_groups,
    I: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,  # of one step
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (t, split): the scores of a run of pages for query t."""
    wait(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    last = tl.load(positions + t)
    table = block_table + tl.load(sequence + t).to(tl.int64) * table_stride
    d = tl.arange(0, BLOCK_I)
    q = tl.load(q_idx + t * q_stride + d, mask=d < I, other=0.0).to(tl.float32)
    num_pages = (last + PAGE) // PAGE  # none for a query at -1
    num_steps = tl.cdiv(num_pages, PAGES)
    per_split = tl.cdiv(num_steps, tl.num_programs(1))
    first = tl.program_id(1) * per_split
    stop = tl.minimum(first + per_split, num_steps)
    TOKENS: tl.constexpr = PAGES * PAGE
    token = tl.arange(0, TOKENS)
    group = tl.arange(0, TOKENS // GROUP)
    for step in tl.range(first, stop, num_stages=STAGES):
        i = step * TOKENS + token
        if PAGES == 1:
            row = tl.load(table + step).to(tl.int64) * PAGE + token
            there = i >= 0
        else:
            there = i // PAGE < num_pages
            row = tl.load(table + i // PAGE, mask=there, other=0).to(tl.int64) * PAGE + i % PAGE
        pointers = k_idx + row[:, None] * k_stride + d[None, :]
        if BLOCK_I == I:
            k = tl.load(pointers)
        else:
            k = tl.load(pointers, mask=(d < I)[None, :], other=0.0)
        scores = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
        key = tl.where(i <= last, keys_of(scores), ABSENT)
        tl.store(keys + t * capacity + i, key, mask=there)
        highest = tl.max(tl.reshape(key, [TOKENS // GROUP, GROUP]), axis=1)
        j = step * (TOKENS // GROUP) + group
        tl.store(maxima + t * max_groups + j, highest, mask=j < num_pages * (PAGE // GROUP))


def score_keys(q_idx: Tensor, k_idx: Tensor, queries: Queries, tiles: SelectTiles) -> tuple[Tensor, Tensor]:
    """Keys of all visible scores [T, capacity] and their maxima by group [T, capacity / group], both int32.

    The capacity is that of the page table; what lies beyond a query's last page stays unwritten.
    """
    num_queries, index_dim = q_idx.shape
    table = queries.block_table
    capacity = table.shape[1] * PAGE_SIZE
    assert q_idx.stride(1) == k_idx.stride(1) == table.stride(1) == 1
    assert queries.positions.is_contiguous() and queries.sequence.is_contiguous()
    keys = torch.empty(num_queries, capacity, dtype=torch.int32, device=q_idx.device)
    maxima = torch.empty(num_queries, capacity // tiles.group, dtype=torch.int32, device=q_idx.device)
    device = limits(q_idx.device)
    _score_kernel[num_queries, tiles.splits](
        q_idx,
        k_idx,
        queries.positions,
        queries.sequence,
        table,
        keys,
        maxima,
        q_idx.stride(0),
        k_idx.stride(0),
        table.stride(0),
        capacity,
        maxima.shape[1],
        I=index_dim,
        BLOCK_I=next_power_of_2(index_dim),
        PAGE=PAGE_SIZE,
        PAGES=tiles.score_pages,
        GROUP=tiles.group,
        STAGES=tiles.score_stages,
        OVERLAP=device.early_launch,
        num_warps=tiles.score_warps,
        **launch_options(device),
    )
    return keys, maxima


def queries_per_launch(max_pages: int) -> int:
    """How many queries with so long a page table the scratch has room for, at least one."""
    return max(1, _MAX_SCRATCH_BYTES // (12 * max_pages * PAGE_SIZE))


def _part(queries: Queries, start: int, stop: int) -> Queries:
    rows = slice(start, stop)
    bounds = tuple(min(max(start, row), stop) - start for row in queries.cu_seqlens)
    return replace(queries, positions=queries.positions[rows], sequence=queries.sequence[rows], cu_seqlens=bounds)


def select(
    q_idx: Tensor, memory: Memory, queries: Queries, k: int, block_size: int, tiles: SelectTiles | None = None
) -> Selection:
    """`Ops.select` for blocks of one token and k up to `tiles.MAX_SELECTED`; `tiles` is for measuring others."""
    if block_size != 1:
        raise BackendError(f"the select kernel takes index_block_size 1, got {block_size}; use the plain op")
    assert memory.k_idx is not None
    num_queries, max_pages = q_idx.shape[0], queries.block_table.shape[1]
    step = queries_per_launch(max_pages)
    tiles = tiles or select_tiles(min(step, num_queries), max_pages, k, limits(q_idx.device))
    if num_queries == 0:
        nothing = torch.empty(0, k, dtype=torch.int32, device=q_idx.device)
        return Selection(nothing, nothing, nothing.new_empty(0))
    many = takes(q_idx.shape[1]) and asks_many(queries)
    parts = []
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        part, q_part = _part(queries, start, stop), q_idx[start:stop]
        if many:
            scores = score_many(q_part, memory.k_idx, part, tiles.group)
        else:
            scores = score_keys(q_part, memory.k_idx, part, tiles)
        parts.append(pick(*scores, part, k, tiles))
    if len(parts) == 1:
        return parts[0]
    return Selection(*(torch.cat([getattr(p, name) for p in parts]) for name in ("positions", "rows", "lengths")))
