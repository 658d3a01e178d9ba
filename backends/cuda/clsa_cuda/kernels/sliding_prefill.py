"""`sliding_attention` of packed chunks: what came before a chunk from the ring, the chunk's own keys from the step."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.ops import Queries, Window
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.prefill import (
    PrefillTiles,
    attend_block,
    check_heads,
    load_tile,
    prefill_tiles,
    query_tiles,
)
from clsa_cuda.kernels.tiles import limits, next_power_of_2


@launcher
@triton.jit
def _sliding_kernel(
    q,  # [T, H, D]
    k,  # [T, G, D]
    v,  # [T, G, D]
    ring_k,  # [slots * W, G, D]
    ring_v,  # [slots * W, G, D]
    slots,  # [B]
    positions,  # [T], consecutive in a sequence, then -1
    tiles,  # [n, 4]
    out,  # [T, H, D]
    H,
    q_stride,
    k_stride,
    v_stride,
    ring_stride,
    scale,  # log2(e) / sqrt(D)
    W,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REPEAT: tl.constexpr,  # query heads of a KV head
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (tile, KV head). Tokens and keys are counted from the first token of the chunk; the ring is below 0."""
    sequence, start, token, head, there = load_tile(tiles, REPEAT, BLOCK_M)
    g = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    position = tl.load(positions + start + token, mask=there, other=-1)
    live = position >= 0
    place = (start + token)[:, None] * q_stride + (g * REPEAT + head)[:, None] * D + d[None, :]
    q_tile = tl.load(q + place, mask=live[:, None] & (d < D)[None, :], other=0.0)
    first = tl.min(token)
    last = tl.max(tl.where(live, token, -1))  # no token of the tile: no key either
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    n = tl.arange(0, BLOCK_N)
    inside = (d < D)[None, :]
    column = g * D + d[None, :]

    begin = tl.load(positions + start)  # of the chunk
    oldest = tl.maximum(first - W + 1, -begin)
    base = tl.load(slots + sequence).to(tl.int64) * W
    for at in tl.range(tl.where(last < 0, 0, oldest), 0, BLOCK_N, num_stages=STAGES):
        key = at + n
        row = base + (begin + key) % W
        mask = (key < 0)[:, None] & inside
        k_tile = tl.load(ring_k + row[:, None] * ring_stride + column, mask=mask, other=0.0)
        v_tile = tl.load(ring_v + row[:, None] * ring_stride + column, mask=mask, other=0.0)
        visible = (key < 0)[None, :] & (token[:, None] - key[None, :] < W)
        acc, total, highest = attend_block(q_tile, k_tile, v_tile, visible, acc, total, highest, scale, True)

    # Blocks that every token of the tile sees whole lie between `low` and `high`; masks are for those around them.
    k += start * k_stride + column
    v += start * v_stride + column
    lowest = tl.maximum(first - W + 1, 0) // BLOCK_N * BLOCK_N
    low = tl.cdiv(tl.maximum(last - W + 1, 0), BLOCK_N) * BLOCK_N
    high = tl.maximum(low, (tl.minimum(first, last) + 1) // BLOCK_N * BLOCK_N)
    for at in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        row = (at + n).to(tl.int64)
        if BLOCK_D == D:
            k_tile = tl.load(k + row[:, None] * k_stride)
            v_tile = tl.load(v + row[:, None] * v_stride)
        else:
            k_tile = tl.load(k + row[:, None] * k_stride, mask=inside, other=0.0)
            v_tile = tl.load(v + row[:, None] * v_stride, mask=inside, other=0.0)
        acc, total, highest = attend_block(q_tile, k_tile, v_tile, inside, acc, total, highest, scale, False)
    before = (low - lowest) // BLOCK_N
    after = tl.cdiv(last + 1 - high, BLOCK_N)
    for i in tl.range(0, tl.maximum(before, 0) + tl.maximum(after, 0), num_stages=STAGES):
        at = tl.where(i < before, lowest + i * BLOCK_N, high + (i - before) * BLOCK_N)
        key = at + n
        row = key.to(tl.int64)
        mask = (key <= last)[:, None] & inside
        k_tile = tl.load(k + row[:, None] * k_stride, mask=mask, other=0.0)
        v_tile = tl.load(v + row[:, None] * v_stride, mask=mask, other=0.0)
        distance = token[:, None] - key[None, :]
        visible = (distance >= 0) & (distance < W)
        acc, total, highest = attend_block(q_tile, k_tile, v_tile, visible, acc, total, highest, scale, True)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    acc = tl.where(live[:, None], acc, 0.0)
    place = ((start + token) * H + g * REPEAT + head)[:, None] * D + d[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=there[:, None] & inside)


def sliding_prefill(
    q: Tensor, k: Tensor, v: Tensor, window: Window, queries: Queries, tiles: PrefillTiles | None = None
) -> Tensor:
    """Attention of a window to a chunk of each sequence and to what its ring held before.

    Args: q [T, H, D], k, v [T, G, D], all with their positions in them; `window` as it was before this chunk's write;
    `tiles` is for measuring others. Positions of a sequence are consecutive, padded rows come last and may hold NaN.

    Returns: [T, H, D], zeros in padded rows. Raises BackendError if the dtypes differ.
    """
    num_tokens, num_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    check_heads(q, {"k": k, "v": v, "the window's k": window.k, "the window's v": window.v})
    assert queries.cu_seqlens[-1] == num_tokens and queries.positions.is_contiguous()
    assert window.k.stride(0) == window.v.stride(0)
    tiles = tiles or prefill_tiles(head_dim, q.itemsize, limits(q.device), window=True)
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    repeat = num_heads // kv_heads
    where = query_tiles(queries.cu_seqlens, repeat, tiles.block_m, q.device)
    if num_tokens == 0:
        return out
    _sliding_kernel[where.shape[0], kv_heads](
        q,
        k,
        v,
        window.k,
        window.v,
        queries.window_slots,
        queries.positions,
        where,
        out,
        num_heads,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        window.k.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        window.size,
        D=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        REPEAT=repeat,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
        maxnreg=tiles.maxnreg,
    )
    return out
