"""`linear` of few rows, with a norm before it or what a block does behind it: one launch (see `product`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clsa.ops import Float8Weight, Weight
from clsa_cuda import plain
from clsa_cuda.kernels.float8_product import float8_sums, float8_tiles
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters
from clsa_cuda.kernels.product import MAX_ROWS, ProductTiles, product_tiles, store, sums
from clsa_cuda.kernels.ring_tiles import RingTiles, tiles_for
from clsa_cuda.kernels.tiles import launch_options, limits, next_power_of_2


@launcher
@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x,  # [M, K], rows x_stride apart
    w,  # [N, K], with SWIGLU [2 N, K]: all rows of gate, then all rows of up; SCALED: [N, K / 4] int32 of 8-bit weights
    scales,  # [N] or [2 N] float32, SCALED only: of 8-bit rows
    norm,  # [K], NORM only; SCALED: [K / 2] int32
    residual,  # [M, N], rows residual_stride apart, ADD only
    out,  # [M, N]
    partial,  # float32 scratch: see ProductTiles.scratch
    arrived,  # [N / ROWS] int32, zeros before and after
    M,
    N,
    x_stride,
    residual_stride,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program tile * SPLITS + split: ROWS outputs of all rows of x, over a part of K."""
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    i = tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n = tile * ROWS + i
    live = (i < ROWS) & (n < N)
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PER_SPLIT: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    first = split * PER_SPLIT
    stop = tl.minimum(first + PER_SPLIT, BLOCKS)
    x_rows = x + m.to(tl.int64)[None, :] * x_stride
    if SCALED:
        acc, up, square = float8_sums(
            x_rows,
            m < M,
            norm,
            w,
            tile,
            N,
            first,
            stop,
            K,
            BLOCK_M,
            ROWS,
            BLOCK_N,
            BLOCK_K,
            STAGES,
            NORM,
            SWIGLU,
            OVERLAP,
        )
    else:
        w_rows = w + tl.where(live, n, 0).to(tl.int64)[:, None] * K
        up_rows = w_rows + tl.cast(N, tl.int64) * K
        acc, up, square = sums(
            x_rows,
            m < M,
            norm,
            w_rows,
            up_rows,
            live,
            first,
            stop,
            K,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            STAGES,
            NORM,
            SWIGLU,
            OVERLAP,
        )
    if SPLITS == 1:
        store(
            acc, up, square, scales, residual, out, n, live, m, M, N, residual_stride, eps, K, SCALED, NORM, SWIGLU, ADD
        )
    else:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        SUMS: tl.constexpr = 2 * SIZE if SWIGLU else SIZE
        WIDTH: tl.constexpr = SUMS + BLOCK_M  # of a part: sums, and the squares behind them
        inside = i[:, None] * BLOCK_M + m[None, :]
        mine = partial + tile.to(tl.int64) * (SPLITS * WIDTH)
        tl.store(mine + split * WIDTH + inside, acc)
        if SWIGLU:
            tl.store(mine + split * WIDTH + SIZE + inside, up)
        if NORM:
            tl.store(mine + split * WIDTH + SUMS + m, square)
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
                    square += tl.load(mine + s * WIDTH + SUMS + m, cache_modifier=".cg")
            store(
                acc,
                up,
                square,
                scales,
                residual,
                out,
                n,
                live,
                m,
                M,
                N,
                residual_stride,
                eps,
                K,
                SCALED,
                NORM,
                SWIGLU,
                ADD,
            )
            tl.store(arrived + tile, 0)


def takes(x: Tensor, weight: Weight) -> bool:
    """Whether `product` takes it: few rows in 16 bits. Many rows, and float32, are cuBLAS's to multiply."""
    w = weight.values if isinstance(weight, Float8Weight) else weight
    in_words = w.itemsize > 1 or w.shape[1] % 4 == 0
    return x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS and x.itemsize == 2 and w.is_contiguous() and in_words


def takes_norm(x: Tensor, weight: Weight) -> bool:
    """Whether the norm may be inside: what is multiplied is x times the norm's weight, too large for a float16."""
    return takes(x, weight) and x.dtype == torch.bfloat16


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`Ops.linear`."""
    return product(x, weight) if takes(x, weight) else F.linear(x, plain.dense(weight, x.dtype))


def product(
    x: Tensor,
    weight: Weight,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tiles: ProductTiles | RingTiles | None = None,
) -> Tensor:
    """x [M, K] by weight [N, K], with the norm before and what comes after it: [M, N], or [M, N / 2] with `swiglu`.

    In `dtype`, by default x's. `tiles` is for measuring others.
    """
    device = limits(x.device)
    if tiles is None:
        tiles = tiles_for(x, weight, swiglu, norm, device)
    if isinstance(tiles, RingTiles):
        # Only where it is used: other GPUs need not load Gluon, nor understand it.
        from clsa_cuda.kernels.ring_product import ring_product

        return ring_product(x, weight, norm, eps, swiglu, residual, dtype or x.dtype, tiles, device)
    scaled = isinstance(weight, Float8Weight)
    w, scales = (weight.values, weight.scales) if isinstance(weight, Float8Weight) else (weight, weight)
    norm_words = norm
    if scaled:
        w, norm_words = w.view(torch.int32), None if norm is None else norm.view(torch.int32)
    num_rows, in_size = x.shape
    out_size = w.shape[0] // 2 if swiglu else w.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    if tiles is None and scaled:
        tiles = float8_tiles(num_rows, out_size, in_size, swiglu, device)
    tiles = tiles or product_tiles(num_rows, out_size, in_size, swiglu, norm is not None, device)
    out = torch.empty(num_rows, out_size, dtype=dtype or x.dtype, device=x.device)
    units, block_m = tiles.units(out_size), max(16, next_power_of_2(num_rows))
    assert units <= MAX_ARRIVALS
    _linear_kernel[units,](
        x,
        w,
        scales,
        x if norm_words is None else norm_words,
        out if residual is None else residual,
        out,
        torch.empty(tiles.scratch(out_size, block_m, swiglu), dtype=torch.float32, device=x.device),
        arrival_counters(x.device),
        num_rows,
        out_size,
        x.stride(0),
        out_size if residual is None else residual.stride(0),
        eps,
        K=in_size,
        BLOCK_M=block_m,
        ROWS=tiles.rows,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        SPLITS=tiles.splits,
        STAGES=tiles.num_stages,
        SCALED=scaled,
        NORM=norm is not None,
        SWIGLU=swiglu,
        ADD=residual is not None,
        OVERLAP=device.early_launch,
        num_warps=tiles.num_warps,
        maxnreg=tiles.max_registers,
        **launch_options(device),
    )
    return out
