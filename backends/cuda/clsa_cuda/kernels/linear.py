"""`linear` of few rows: the weights stream through once, at the speed of the memory.

With at most 64 rows a product reads far more than it computes, so what counts is bytes in flight. The weights take
the long side of the tensor-core tile and the rows of x the short one. K is split where the output alone has too few
tiles to fill the GPU; the program that arrives last sums the parts in their order, so the result does not depend on
timing, nor on how many other rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters, prefetch, wait
from clsa_cuda.kernels.tiles import Limits, launch_options, limits, next_power_of_2

MAX_ROWS = 64
_PREFETCH = 5  # blocks of K; 80 KB of weights a program


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """Outputs and inputs per tile, parts that K is split into, warps and pipeline depth."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def linear_tiles(out_size: int, in_size: int, device: Limits) -> LinearTiles:
    """One program or two for every multiprocessor, each with several tiles of K in flight (docs/log.md)."""
    block_n, block_k = 64, 128
    tiles = triton.cdiv(out_size, block_n)
    splits = 1
    while tiles * splits < device.sm_count and splits < 16 and in_size // (2 * splits) >= 4 * block_k:
        splits *= 2
    return LinearTiles(block_n, block_k, splits, num_warps=4, num_stages=4)


@triton.jit
def _linear_kernel(
    x,  # [M, K], rows x_stride apart
    w,  # [N, K]
    out,  # [M, N]
    partial,  # [N / BLOCK_N, SPLITS, BLOCK_N, BLOCK_M] float32 scratch
    arrived,  # [N / BLOCK_N] int32, zeros before and after
    M,
    N,
    x_stride,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,  # blocks of K whose weights are asked for while the kernel in front still runs
    OVERLAP: tl.constexpr,
):
    """Program (tile, split): BLOCK_N outputs of all rows, over a part of K."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    i = tl.arange(0, BLOCK_K)
    w_rows = w + n.to(tl.int64)[:, None] * K
    x_rows = x + m.to(tl.int64)[None, :] * x_stride
    num_blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    per_split: tl.constexpr = (num_blocks + SPLITS - 1) // SPLITS
    first = split * per_split
    stop = tl.minimum(first + per_split, num_blocks)
    if OVERLAP:
        line = tl.arange(0, BLOCK_K // 64) * 64  # 128 bytes of 16-bit weights
        for ahead in tl.static_range(PREFETCH):
            column = tl.minimum((first + ahead) * BLOCK_K + line, K - 1)
            prefetch(w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + column[None, :])
    wait(OVERLAP)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(first, stop, num_stages=STAGES):
        k = block * BLOCK_K + i
        w_tile = tl.load(w_rows + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        x_tile = tl.load(x_rows + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(w_tile, x_tile, acc)
    place = out + m.to(tl.int64)[None, :] * N + n[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    if SPLITS == 1:
        tl.store(place, acc.to(out.dtype.element_ty), mask=mask)
    else:
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        mine = partial + tile.to(tl.int64) * SPLITS * BLOCK_N * BLOCK_M
        tl.store(mine + split * BLOCK_N * BLOCK_M + inside, acc, mask=mask)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for s in tl.static_range(SPLITS):
                total += tl.load(mine + s * BLOCK_N * BLOCK_M + inside, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(place, total.to(out.dtype.element_ty), mask=mask)
            tl.store(arrived + tile, 0)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` uses the kernel: few rows in 16 bits. Many rows, and float32, are cuBLAS's to multiply."""
    return x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS and x.itemsize == 2 and weight.is_contiguous()


def linear(x: Tensor, weight: Tensor, tiles: LinearTiles | None = None) -> Tensor:
    """`Ops.linear`; `tiles` is for measuring others."""
    if not takes(x, weight):
        return F.linear(x, weight)
    num_rows, in_size = x.shape
    out_size = weight.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    tiles = tiles or linear_tiles(out_size, in_size, limits(x.device))
    out = torch.empty(num_rows, out_size, dtype=x.dtype, device=x.device)
    num_tiles = triton.cdiv(out_size, tiles.block_n)
    assert num_tiles <= MAX_ARRIVALS
    block_m = max(16, next_power_of_2(num_rows))
    parts = num_tiles * tiles.splits * tiles.block_n * block_m if tiles.splits > 1 else 0
    _linear_kernel[num_tiles, tiles.splits](
        x,
        weight,
        out,
        torch.empty(parts, dtype=torch.float32, device=x.device),
        arrival_counters(x.device),
        num_rows,
        out_size,
        x.stride(0),
        K=in_size,
        BLOCK_M=block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        SPLITS=tiles.splits,
        STAGES=tiles.num_stages,
        PREFETCH=_PREFETCH,
        OVERLAP=limits(x.device).early_launch,
        num_warps=tiles.num_warps,
        **launch_options(limits(x.device)),
    )
    return out
