"""Products of few rows inside a kernel: the weights stream through once, with what comes before and after them.

With at most 64 rows a product reads far more than it computes, so what counts is bytes in flight, from the first
microsecond to the last: one wave of programs shares the outputs evenly, each with several tiles of K on their way. The
weights take the long side of the tensor-core tile and the rows of x the short one. K is split where the rows of x that
every program reads would weigh as much as its weights; the program that arrives last sums the parts in their order, so
the result does not depend on timing, nor on how many other rows there are.

In front of the product the rows may be normed: each program sums the squares of what it reads anyway, and scales its
sums at the end. Behind it come silu(gate) * up, where a tile has rows of both matrices, or the residual.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import triton
import triton.language as tl

from clsa_cuda.kernels.float8 import finite
from clsa_cuda.kernels.overlap import wait
from clsa_cuda.kernels.tiles import Limits, cdiv, next_power_of_2, remembered

MAX_ROWS = 64
_MAX_BLOCK = 64  # outputs of a tile


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """How a product is cut: `rows` outputs by a part of K for each of `units(out_size)` pieces of work."""

    rows: int  # outputs of a tile; its block is the next power of two
    block_k: int
    splits: int  # parts of K
    num_stages: int  # tiles of weights in flight
    num_warps: int = 4
    max_registers: int | None = field(default=None, kw_only=True)  # of a thread; None: what the compiler wants

    @property
    def block_n(self) -> int:
        return max(16, next_power_of_2(self.rows))

    def units(self, out_size: int) -> int:
        return cdiv(out_size, self.rows) * self.splits

    def scratch(self, out_size: int, block_m: int, swiglu: bool) -> int:
        """Floats that the parts of K need: sums, and squares of the norm."""
        parts = self.units(out_size) * block_m
        return 0 if self.splits == 1 else parts * (self.block_n * (2 if swiglu else 1) + 1)


@remembered
def product_tiles(num_rows: int, out_size: int, in_size: int, swiglu: bool, norm: bool, device: Limits) -> ProductTiles:
    """A tile for every multiprocessor, as deep a pipeline as fits; measured on an H200 (docs/log.md)."""
    splits = 1 if swiglu or in_size < 1024 else 2
    rows = cdiv(out_size * splits, device.sm_count)
    if splits == 2 and cdiv(3 * out_size, device.sm_count) <= _MAX_BLOCK:
        splits = 3  # fuller tiles: 2,560 outputs are 59 rows of 64 instead of 39
        rows = cdiv(out_size * splits, device.sm_count)
    waves = cdiv(rows, _MAX_BLOCK)
    rows = max(1, cdiv(rows, waves))
    many = waves > 4  # then programs overlap each other, and smaller ones leave room for it
    # The norm's weights are fetched ahead of their use if a thread takes at least two of them.
    block_k = 64 if many else 256 if norm and not swiglu else 128
    block_k = min(block_k, max(16, next_power_of_2(in_size)))
    block_n, block_m = (max(16, next_power_of_2(size)) for size in (rows, num_rows))
    parts = 2 if swiglu else 1
    # Beside the stages there are the weights that were read ahead.
    room = device.shared_memory - block_n * parts * block_k * 2 - (16 << 10)
    stages = max(2, min(5 if many else 8, room // ((block_n * parts + block_m) * block_k * 2)))
    return ProductTiles(rows, block_k, 1 if many else splits, stages, num_warps=8 if swiglu and not many else 4)


@triton.jit
def _add(acc, up_acc, square, x_tile, w_tile, up_tile, norm_tile, NORM: tl.constexpr, SWIGLU: tl.constexpr):
    """One block of K in the sums: products with w and up [BLOCK_N, BLOCK_M], squares of x [BLOCK_K, BLOCK_M]."""
    if NORM:
        wide = x_tile.to(tl.float32)
        square += wide * wide
        x_tile = (wide * norm_tile.to(tl.float32)[:, None]).to(x_tile.dtype)
    acc = tl.dot(w_tile, x_tile, acc)
    if SWIGLU:
        up_acc = tl.dot(up_tile, x_tile, up_acc)
    return acc, up_acc, square


@triton.jit
def sums(
    x_rows,
    m_live,
    norm,
    w_rows,
    up_rows,
    n_live,
    first,
    stop,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] twice, [BLOCK_M]: the products with w and up, and the squares of x, over some blocks of K."""
    i = tl.arange(0, BLOCK_K)
    k = first * BLOCK_K + i
    # The first weights come while the kernel in front still makes x, and are used last.
    w_first = tl.load(w_rows + k[None, :], mask=n_live[:, None] & (k < K)[None, :], other=0.0)
    up_first = w_first
    if SWIGLU:
        up_first = tl.load(up_rows + k[None, :], mask=n_live[:, None] & (k < K)[None, :], other=0.0)
    norm_first = w_first
    if NORM:
        norm_first = tl.load(norm + k, mask=k < K, other=0.0)
    wait(OVERLAP)
    x_first = tl.load(x_rows + k[:, None], mask=m_live[None, :] & (k < K)[:, None], other=0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    square = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for block in tl.range(first + 1, stop, num_stages=STAGES):
        k = block * BLOCK_K + i
        mask = n_live[:, None] & (k < K)[None, :]
        x_tile = tl.load(x_rows + k[:, None], mask=m_live[None, :] & (k < K)[:, None], other=0.0)
        w_tile = tl.load(w_rows + k[None, :], mask=mask, other=0.0)
        up_tile = w_tile
        if SWIGLU:
            up_tile = tl.load(up_rows + k[None, :], mask=mask, other=0.0)
        norm_tile = w_tile
        if NORM:
            norm_tile = tl.load(norm + k, mask=k < K, other=0.0)
        acc, up_acc, square = _add(acc, up_acc, square, x_tile, w_tile, up_tile, norm_tile, NORM, SWIGLU)
    acc, up_acc, square = _add(acc, up_acc, square, x_first, w_first, up_first, norm_first, NORM, SWIGLU)
    return acc, up_acc, tl.sum(square, axis=0)


@triton.jit
def store(
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
    K: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,
):
    """From sums to outputs: the scales of the weights and of the norm, the feed-forward's gate, the residual."""
    if SCALED:
        acc = acc * finite(tl.load(scales + n, mask=live, other=0.0))[:, None]
        if SWIGLU:
            up = up * finite(tl.load(scales + N + n, mask=live, other=0.0))[:, None]
    if NORM:
        scale = 1.0 / tl.sqrt(square / K + eps)
        acc = acc * scale[None, :]
        up = up * scale[None, :]
    if SWIGLU:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    mask = live[:, None] & (m < M)[None, :]
    rows = m.to(tl.int64)[None, :]
    if ADD:
        acc += tl.load(residual + rows * residual_stride + n[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * N + n[:, None], acc.to(out.dtype.element_ty), mask=mask)
