"""`dense_attention` of packed chunks: every visible row of a paged memory, for tiles of queries. Or those marked."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries
from clsa_cuda.kernels.float8 import widened
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.prefill import (
    PrefillTiles,
    attend_block,
    check_heads,
    load_tile,
    page_rows,
    prefill_tiles,
    query_tiles,
)
from clsa_cuda.kernels.tiles import limits, next_power_of_2
from clsa_cuda.plain import FLOAT8


@launcher
@triton.jit
def _causal_kernel(
    q,  # [T, H, D]
    k,  # [N, G, D]
    v,  # [N, G, D]
    block_table,  # [B, M]
    positions,  # [T]
    tiles,  # [n, 4]
    marks,  # [T, M * PAGE] int8, MARKED only
    out,  # [T, H, D]
    H,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    marks_stride,
    scale,  # log2(e) / sqrt(D)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REPEAT: tl.constexpr,  # query heads of a KV head
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    MARKED: tl.constexpr,  # whether a query sees only what is marked
):
    """Program (tile, KV head)."""
    sequence, start, token, head, there = load_tile(tiles, REPEAT, BLOCK_M)
    g = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    position = tl.load(positions + start + token, mask=there, other=-1)
    live = position >= 0
    place = (start + token)[:, None] * q_stride + (g * REPEAT + head)[:, None] * D + d[None, :]
    q_tile = tl.load(q + place, mask=live[:, None] & inside, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    table = block_table + sequence * table_stride
    k += g * D + d[None, :]
    v += g * D + d[None, :]
    n = tl.arange(0, BLOCK_N)
    marks += (start + token)[:, None] * marks_stride + n[None, :]
    last = tl.max(position)
    lowest = tl.min(tl.where(live, position, last))
    whole = (lowest + 1) // BLOCK_N * BLOCK_N  # every query sees all keys before it
    for at in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        row = page_rows(table, at, at + n, n >= 0, PAGE, BLOCK_N)
        if BLOCK_D == D:
            k_tile = widened(tl.load(k + row[:, None] * k_stride), q_tile)
            v_tile = widened(tl.load(v + row[:, None] * v_stride), q_tile)
        else:
            k_tile = widened(tl.load(k + row[:, None] * k_stride, mask=inside, other=0.0), q_tile)
            v_tile = widened(tl.load(v + row[:, None] * v_stride, mask=inside, other=0.0), q_tile)
        visible = inside
        if MARKED:
            visible = tl.load(marks + at, mask=live[:, None], other=0) != 0
        acc, total, highest = attend_block(q_tile, k_tile, v_tile, visible, acc, total, highest, scale, MARKED)
    for at in tl.range(whole, last + 1, BLOCK_N, num_stages=STAGES):
        key = at + n
        row = page_rows(table, at, key, key <= last, PAGE, BLOCK_N)
        mask = (key <= last)[:, None] & inside
        k_tile = widened(tl.load(k + row[:, None] * k_stride, mask=mask, other=0.0), q_tile)
        v_tile = widened(tl.load(v + row[:, None] * v_stride, mask=mask, other=0.0), q_tile)
        visible = key[None, :] <= position[:, None]
        if MARKED:
            visible = tl.load(marks + at, mask=visible, other=0) != 0
        acc, total, highest = attend_block(q_tile, k_tile, v_tile, visible, acc, total, highest, scale, True)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = ((start + token) * H + g * REPEAT + head)[:, None] * D + d[None, :]
    tl.store(out + place, tl.where(live[:, None], acc, 0.0).to(out.dtype.element_ty), mask=there[:, None] & inside)


def causal_prefill(
    q: Tensor, memory: Memory, queries: Queries, tiles: PrefillTiles | None = None, marks: Tensor | None = None
) -> Tensor:
    """`Ops.dense_attention` of chunks: q [T, H, D] -> [T, H, D]; `tiles` is for measuring others.

    What a query sees follows from its position alone, so `context_lens` may be bounds, and positions of a sequence
    may have gaps; the memory may be E4M3. With `marks` [T, tokens of the page table] int8 a query sees only what is
    marked. Raises BackendError if the dtypes differ otherwise.
    """
    num_tokens, num_heads, head_dim = q.shape
    kv_heads = memory.k.shape[1]
    check_heads(q, {"the memory's k": memory.k, "the memory's v": memory.v}, FLOAT8)
    table = queries.block_table
    assert marks is None or (marks.shape[0] == num_tokens and marks.stride(1) == 1)
    assert queries.cu_seqlens[-1] == num_tokens and queries.positions.is_contiguous() and table.stride(1) == 1
    tiles = tiles or prefill_tiles(head_dim, q.itemsize, limits(q.device), window=False)
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    repeat = num_heads // kv_heads
    where = query_tiles(queries.cu_seqlens, repeat, tiles.block_m, q.device)
    if num_tokens == 0:
        return out
    _causal_kernel[where.shape[0], kv_heads](
        q,
        memory.k,
        memory.v,
        table,
        queries.positions,
        where,
        where if marks is None else marks,
        out,
        num_heads,
        q.stride(0),
        memory.k.stride(0),
        memory.v.stride(0),
        table.stride(0),
        0 if marks is None else marks.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        D=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        REPEAT=repeat,
        PAGE=PAGE_SIZE,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.num_stages,
        MARKED=marks is not None,
        num_warps=tiles.num_warps,
        maxnreg=tiles.maxnreg,
    )
    return out
