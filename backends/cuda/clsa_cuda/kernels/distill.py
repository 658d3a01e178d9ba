"""The teacher of an index: causal attention averaged over heads, for a block of queries, in two passes over the keys.

The first leaves the base-2 logarithm of each head's softmax sum. With it known, every head of a tile of (queries, keys)
can be added up in registers, and only the average is written. Both do the products of queries and keys once, no two
programs write the same value, and the heads of a tile are added in their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.errors import BackendError
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.tiles import Limits, cdiv, limits, next_power_of_2


@dataclass(frozen=True, slots=True)
class DistillTiles:
    """Queries and keys of a tile, warps, pipeline depth, and registers a thread may have at most."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int = 255


def distill_tiles(streams_queries: bool, head_dim: int, itemsize: int, device: Limits) -> DistillTiles:
    """Of the pass that keeps a tile of keys and streams queries, or of the one that keeps queries and streams keys.

    128 rows are kept, so that each row that is read is worth many products. Two programs fit a multiprocessor, so that
    one can multiply while the other takes exponentials.
    """
    if itemsize == 4:
        return DistillTiles(16, 16, num_warps=4, num_stages=2)  # made in registers, not by tensor cores
    kept, streamed, stages = (128, 64, 3) if streams_queries else (128, 128, 2)
    row_bytes = max(16, next_power_of_2(head_dim)) * itemsize
    room = device.shared_memory // 2 - 1024
    while streamed > 16 and (kept + stages * streamed) * row_bytes > room:
        if stages > 2:
            stages -= 1
        else:
            kept, streamed = kept // 2, streamed // 2
    block_q, block_k = (streamed, kept) if streams_queries else (kept, streamed)
    if block_q == 128:
        return DistillTiles(block_q, block_k, num_warps=8, num_stages=stages, registers=128)
    return DistillTiles(block_q, block_k, num_warps=4, num_stages=stages)


@triton.jit
def _absorb(scores, highest, total, scale):
    """The running maximum and sum of a softmax with one more tile of scores."""
    new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new_highest[:, None])
    return new_highest, total * tl.exp2(highest - new_highest) + tl.sum(weights, axis=1)


@launcher
@triton.jit
def _softmax_sum_kernel(
    q,  # [B, G, M, C, D]
    k,  # [B, G, S, D], strides below
    sums,  # [B, G, M, C] float32: the result
    G,
    M,
    C,
    S,
    k_batch,
    k_group,
    k_row,
    scale,  # log2(e) / sqrt(D)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (query block * M + m, b * G + g)."""
    first = tl.program_id(0) // M * BLOCK_Q
    pair = tl.program_id(1).to(tl.int64)
    head = pair * M + tl.program_id(0) % M
    c = first + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    q_tile = tl.load(q + (head * C + c)[:, None] * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
    keys = k + pair // G * k_batch + pair % G * k_group
    position = S - C + c
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    seen_by_all = (S - C + first + 1) // BLOCK_K  # blocks of keys that need no mask
    for block in tl.range(0, seen_by_all, num_stages=STAGES):
        s = block * BLOCK_K + tl.arange(0, BLOCK_K)
        k_tile = tl.load(keys + s.to(tl.int64)[:, None] * k_row + d[None, :], mask=(d < D)[None, :], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        highest, total = _absorb(scores, highest, total, scale)
    for block in tl.range(seen_by_all, tl.cdiv(tl.minimum(S - C + first + BLOCK_Q, S), BLOCK_K), num_stages=1):
        s = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (s < S)[:, None] & (d < D)[None, :]
        k_tile = tl.load(keys + s.to(tl.int64)[:, None] * k_row + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores = tl.where(s[None, :] <= position[:, None], scores, float("-inf"))
        highest, total = _absorb(scores, highest, total, scale)
    tl.store(sums + head * C + c, highest + tl.log2(total), mask=c < C)


@launcher
@triton.jit
def _weighted_attention_kernel(
    q,  # [B, G, M, C, D]
    k,  # [B, G, S, D], strides below
    sums,  # [B, G, M, C] float32
    out,  # [B, C, S] float32: the result
    G,
    M,
    C,
    S,
    k_batch,
    k_group,
    k_row,
    scale,  # log2(e) / sqrt(D)
    weight,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (key block, query block, b)."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * BLOCK_Q
    c = first + tl.arange(0, BLOCK_Q)
    s = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    q_mask = (c < C)[:, None] & (d < D)[None, :]
    k_mask = (s < S)[:, None] & (d < D)[None, :]
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    groups = tl.where(tl.program_id(0) * BLOCK_K < S - C + first + BLOCK_Q, G, 0)  # 0: none of the keys is visible
    for g in range(groups):
        keys = k + b * k_batch + g * k_group
        k_tile = tl.load(keys + s.to(tl.int64)[:, None] * k_row + d[None, :], mask=k_mask, other=0.0)
        rows = (b * G + g) * M * C + c
        for m in tl.range(0, M, num_stages=STAGES):
            row = rows + m * C
            q_tile = tl.load(q + row[:, None] * D + d[None, :], mask=q_mask, other=0.0)
            log_sum = tl.load(sums + row, mask=c < C, other=0.0)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            total += tl.exp2(scores * scale - log_sum[:, None])  # anything, even inf, where a key is not visible
    total = tl.where(s[None, :] <= (S - C + c)[:, None], total * weight, 0.0)
    place = out + (b * C + c)[:, None] * S + s.to(tl.int64)[None, :]
    tl.store(place, total, mask=(c < C)[:, None] & (s < S)[None, :])


def softmax_sums(q: Tensor, k: Tensor, tiles: DistillTiles | None = None) -> Tensor:
    """log2 of the sum of exp(score) over the visible keys: q [B, G, M, C, D], k [B, G, S, D] -> [B, G, M, C] float32.

    The queries are the last C of S positions; `tiles` is for measuring others. Raises BackendError if q and k differ
    in dtype.
    """
    B, G, M, C, D = q.shape
    tiles = tiles or distill_tiles(False, D, q.itemsize, limits(q.device))
    sums = torch.empty(B, G, M, C, dtype=torch.float32, device=q.device)
    grid = (cdiv(C, tiles.block_q) * M, B * G)
    _softmax_sum_kernel[grid](q, k, sums, *_sizes(q, k), **_options(D, tiles))
    return sums


def weighted_attention(q: Tensor, k: Tensor, sums: Tensor, weight: float, tiles: DistillTiles | None = None) -> Tensor:
    """weight * the sum of the causal attention of all heads: [B, C, S] float32, 0 where a key is not visible.

    `sums` is what `softmax_sums` gives for the same q and k; `tiles` is for measuring others.
    """
    B, _, _, C, D = q.shape
    S = k.shape[2]
    tiles = tiles or distill_tiles(True, D, q.itemsize, limits(q.device))
    out = torch.empty(B, C, S, dtype=torch.float32, device=q.device)
    grid = (cdiv(S, tiles.block_k), cdiv(C, tiles.block_q), B)
    _weighted_attention_kernel[grid](q, k, sums, out, *_sizes(q, k), weight, **_options(D, tiles))
    return out


def _sizes(q: Tensor, k: Tensor) -> tuple[int | float, ...]:
    """What both kernels are told of q and k, from G to scale."""
    _, G, M, C, D = q.shape
    if q.dtype != k.dtype:
        raise BackendError(f"distillation needs q and k in one dtype, got {q.dtype} and {k.dtype}")
    assert q.is_contiguous() and k.stride(3) == 1
    return (G, M, C, k.shape[2], *k.stride()[:3], math.log2(math.e) / math.sqrt(D))


def _options(head_dim: int, tiles: DistillTiles) -> dict[str, int]:
    return {
        "D": head_dim,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "BLOCK_Q": tiles.block_q,
        "BLOCK_K": tiles.block_k,
        "STAGES": tiles.num_stages,
        "num_warps": tiles.num_warps,
        "maxnreg": tiles.registers,
    }
