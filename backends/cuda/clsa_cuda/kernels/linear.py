"""`linear` of few rows, with a norm before it or what a block does behind it: one launch (see `product`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clsa.ops import Float8Weight, Weight
from clsa_cuda import plain
from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters
from clsa_cuda.kernels.product import MAX_ROWS, ProductTiles, product_tiles
from clsa_cuda.kernels.product import product as multiply
from clsa_cuda.kernels.tiles import launch_options, limits, next_power_of_2


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x,
    w,
    scales,
    norm,
    residual,
    out,
    partial,
    arrived,
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
    """Program u: piece u of the product; for the arguments see `product`."""
    unit = tl.program_id(0)
    multiply(
        unit,
        x,
        w,
        scales,
        norm,
        residual,
        out,
        partial,
        arrived,
        M,
        N,
        x_stride,
        residual_stride,
        eps,
        K,
        BLOCK_M,
        ROWS,
        BLOCK_N,
        BLOCK_K,
        SPLITS,
        STAGES,
        SCALED,
        NORM,
        SWIGLU,
        ADD,
        OVERLAP,
    )


def takes(x: Tensor, weight: Weight) -> bool:
    """Whether `product` takes it: few rows in 16 bits. Many rows, and float32, are cuBLAS's to multiply."""
    w = weight.values if isinstance(weight, Float8Weight) else weight
    return x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS and x.itemsize == 2 and w.is_contiguous()


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
    tiles: ProductTiles | None = None,
) -> Tensor:
    """x [M, K] by weight [N, K], with the norm before and what comes after it: [M, N], or [M, N / 2] with `swiglu`.

    `tiles` is for measuring others.
    """
    scaled = isinstance(weight, Float8Weight)
    w, scales = (weight.values, weight.scales) if isinstance(weight, Float8Weight) else (weight, weight)
    num_rows, in_size = x.shape
    out_size = w.shape[0] // 2 if swiglu else w.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    device = limits(x.device)
    tiles = tiles or product_tiles(num_rows, out_size, in_size, swiglu, norm is not None, device)
    out = torch.empty(num_rows, out_size, dtype=x.dtype, device=x.device)
    units, block_m = tiles.units(out_size), max(16, next_power_of_2(num_rows))
    assert units <= MAX_ARRIVALS
    _linear_kernel[units,](
        x,
        w,
        scales,
        x if norm is None else norm,
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
        **launch_options(device),
    )
    return out
