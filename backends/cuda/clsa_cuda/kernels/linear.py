"""Products of few rows with what comes before and after them: the weights stream through once.

With at most 64 rows a product reads far more than it computes, so what counts is bytes in flight. The weights take
the long side of the tensor-core tile and the rows of x the short one; a single row is multiplied in registers. K is
split where the output alone has too few tiles to fill the GPU; the program that arrives last sums the parts in their
order, so the result does not depend on timing, nor on how many other rows there are.

In front of the product the rows may be normed: each program sums the squares of what it reads anyway, and scales its
sums at the end. Behind it come silu(gate) * up, where a tile has rows of both matrices, or the residual.
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


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """Outputs and inputs per tile, parts that K is split into, warps and pipeline depth."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int
    prefetch: int = 5  # blocks of K whose weights a program asks for while the kernel in front still runs


def linear_tiles(out_size: int, in_size: int, device: Limits) -> LinearTiles:
    """One program or two for every multiprocessor, each with several tiles of K in flight (docs/log.md)."""
    block_n, block_k = 64, 128
    tiles = triton.cdiv(out_size, block_n)
    splits = 1
    while tiles * splits < device.sm_count and splits < 16 and in_size // (2 * splits) >= 4 * block_k:
        splits *= 2
    return LinearTiles(block_n, block_k, splits, num_warps=4, num_stages=4)


@triton.jit
def _ask(w_rows, start, K, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr):
    """Prefetch BLOCKS blocks of K from `start`: 128 bytes a line."""
    PER_LINE: tl.constexpr = 128 // (w_rows.dtype.element_ty.primitive_bitwidth // 8)
    line = tl.arange(0, BLOCK_K // PER_LINE) * PER_LINE
    for ahead in tl.static_range(BLOCKS):
        prefetch(w_rows + tl.minimum(start + ahead * BLOCK_K + line, K - 1)[None, :])


@triton.jit
def _sums_of_one_row(
    x,
    norm,
    w_rows,
    up_rows,
    first,
    stop,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """[BLOCK_N, 1] twice, [1]: the products with w and up, and the sum of the squares of x, over some blocks of K."""
    i = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([1, BLOCK_K], tl.float32)
    for block in tl.range(first, stop, num_stages=STAGES):
        k = block * BLOCK_K + i[None, :]
        inside = k < K
        if K % BLOCK_K == 0:
            w_tile = tl.load(w_rows + k)
        else:
            w_tile = tl.load(w_rows + k, mask=inside, other=0.0)
        x_tile = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            square += x_tile * x_tile
            x_tile = (x_tile * tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
            x_tile = x_tile.to(tl.float32)
        acc += w_tile.to(tl.float32) * x_tile
        if SWIGLU:
            up_acc += tl.load(up_rows + k, mask=inside, other=0.0).to(tl.float32) * x_tile
    return tl.sum(acc, axis=1)[:, None], tl.sum(up_acc, axis=1)[:, None], tl.sum(square, axis=1)


@triton.jit
def _sums_of_rows(
    x_rows,
    m,
    M,
    norm,
    w_rows,
    up_rows,
    first,
    stop,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] twice, [BLOCK_M]: as `_sums_of_one_row`, of several rows on tensor cores."""
    i = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    square = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for block in tl.range(first, stop, num_stages=STAGES):
        k = block * BLOCK_K + i
        inside = k < K
        x_tile = tl.load(x_rows + k[:, None], mask=(m < M)[None, :] & inside[:, None], other=0.0)
        if K % BLOCK_K == 0:
            w_tile = tl.load(w_rows + k[None, :])
        else:
            w_tile = tl.load(w_rows + k[None, :], mask=inside[None, :], other=0.0)
        if NORM:
            wide = x_tile.to(tl.float32)
            square += wide * wide
            x_tile = (wide * tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)[:, None]).to(x_tile.dtype)
        acc = tl.dot(w_tile.to(x_tile.dtype), x_tile, acc)
        if SWIGLU:
            u_tile = tl.load(up_rows + k[None, :], mask=inside[None, :], other=0.0)
            up_acc = tl.dot(u_tile.to(x_tile.dtype), x_tile, up_acc)
    return acc, up_acc, tl.sum(square, axis=0)


@triton.jit
def _store(
    acc,
    up,
    square,
    residual,
    out,
    n,
    m,
    M,
    N,
    residual_stride,
    eps,
    K: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,
):
    """From sums to outputs: the norm's scale of each row, the feed-forward's gate, the residual."""
    if NORM:
        scale = 1.0 / tl.sqrt(square / K + eps)
        acc = acc * scale[None, :]
        up = up * scale[None, :]
    if SWIGLU:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    mask = (n < N)[:, None] & (m < M)[None, :]
    rows = m.to(tl.int64)[None, :]
    if ADD:
        acc += tl.load(residual + rows * residual_stride + n[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * N + n[:, None], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _linear_kernel(
    x,  # [M, K], rows x_stride apart
    w,  # [N, K], with SWIGLU [2 N, K]: all rows of gate, then all rows of up
    norm,  # [K], NORM only
    residual,  # [M, N], rows residual_stride apart, ADD only
    out,  # [M, N]
    partial,  # [N / BLOCK_N, SPLITS, 1 or 2, BLOCK_N, BLOCK_M] float32 scratch
    squares,  # [N / BLOCK_N, SPLITS, BLOCK_M] float32 scratch
    arrived,  # [N / BLOCK_N] int32, zeros before and after
    M,
    N,
    x_stride,
    residual_stride,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (tile, split): BLOCK_N outputs of all rows, over a part of K. BLOCK_M 1 is one row, in registers."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    w_rows = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    up_rows = w_rows + tl.cast(N, tl.int64) * K
    num_blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    per_split: tl.constexpr = (num_blocks + SPLITS - 1) // SPLITS
    first = split * per_split
    stop = tl.minimum(first + per_split, num_blocks)
    if OVERLAP and PREFETCH > 0:
        _ask(w_rows, first * BLOCK_K, K, BLOCK_K, PREFETCH)
        if SWIGLU:
            _ask(up_rows, first * BLOCK_K, K, BLOCK_K, PREFETCH)
    wait(OVERLAP)

    if BLOCK_M == 1:
        acc, up, square = _sums_of_one_row(
            x, norm, w_rows, up_rows, first, stop, K, BLOCK_N, BLOCK_K, STAGES, NORM, SWIGLU
        )
    else:
        x_rows = x + m.to(tl.int64)[None, :] * x_stride
        acc, up, square = _sums_of_rows(
            x_rows, m, M, norm, w_rows, up_rows, first, stop, K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, NORM, SWIGLU
        )
    if SPLITS == 1:
        _store(acc, up, square, residual, out, n, m, M, N, residual_stride, eps, K, NORM, SWIGLU, ADD)
    else:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        WIDTH: tl.constexpr = 2 * SIZE if SWIGLU else SIZE
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        mine = partial + tile.to(tl.int64) * (SPLITS * WIDTH)
        own_squares = squares + tile * (SPLITS * BLOCK_M) + m
        tl.store(mine + split * WIDTH + inside, acc)
        if SWIGLU:
            tl.store(mine + split * WIDTH + SIZE + inside, up)
        if NORM:
            tl.store(own_squares + split * BLOCK_M, square)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            square = tl.zeros([BLOCK_M], tl.float32)
            for s in tl.static_range(SPLITS):  # .cg: from L2, where the other programs' stores are
                acc += tl.load(mine + s * WIDTH + inside, cache_modifier=".cg")
                if SWIGLU:
                    up += tl.load(mine + s * WIDTH + SIZE + inside, cache_modifier=".cg")
                if NORM:
                    square += tl.load(own_squares + s * BLOCK_M, cache_modifier=".cg")
            _store(acc, up, square, residual, out, n, m, M, N, residual_stride, eps, K, NORM, SWIGLU, ADD)
            tl.store(arrived + tile, 0)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` uses the kernel: few rows in 16 bits. Many rows, and float32, are cuBLAS's to multiply."""
    return x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS and x.itemsize == 2 and weight.is_contiguous()


def takes_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether the norm may be inside: what is multiplied is x times the norm's weight, too large for a float16."""
    return takes(x, weight) and x.dtype == torch.bfloat16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`Ops.linear`."""
    return product(x, weight) if takes(x, weight) else F.linear(x, weight)


def product(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Tensor | None = None,
    tiles: LinearTiles | None = None,
) -> Tensor:
    """x [M, K] by weight [N, K], with the norm before and what comes after it: [M, N], or [M, N / 2] with `swiglu`.

    `tiles` is for measuring others.
    """
    num_rows, in_size = x.shape
    out_size = weight.shape[0] // 2 if swiglu else weight.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    device = limits(x.device)
    tiles = tiles or linear_tiles(out_size, in_size, device)
    out = torch.empty(num_rows, out_size, dtype=x.dtype, device=x.device)
    num_tiles = triton.cdiv(out_size, tiles.block_n)
    assert num_tiles <= MAX_ARRIVALS
    block_m = 1 if num_rows == 1 else max(16, next_power_of_2(num_rows))
    parts = num_tiles * tiles.splits * block_m if tiles.splits > 1 else 0
    scratch = torch.empty(parts * (tiles.block_n * (2 if swiglu else 1) + 1), dtype=torch.float32, device=x.device)
    _linear_kernel[num_tiles, tiles.splits](
        x,
        weight,
        x if norm is None else norm,
        out if residual is None else residual,
        out,
        scratch[parts:],
        scratch,
        arrival_counters(x.device),
        num_rows,
        out_size,
        x.stride(0),
        out_size if residual is None else residual.stride(0),
        eps,
        K=in_size,
        BLOCK_M=block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        SPLITS=tiles.splits,
        STAGES=tiles.num_stages,
        PREFETCH=tiles.prefetch,
        NORM=norm is not None,
        SWIGLU=swiglu,
        ADD=residual is not None,
        OVERLAP=device.early_launch,
        num_warps=tiles.num_warps,
        **launch_options(device),
    )
    return out
