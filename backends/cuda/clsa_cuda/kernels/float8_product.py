"""The sums of a product (see `product`) whose weights are float8 E4M3: four of them in a word.

Tensor cores take weights of 16 bits, so these are made in registers, two at a time, which are not neighbours: numbers 0
and 2 of each word, and numbers 1 and 3. The inputs are split alike, into those of even and those of odd places, and the
sum over K does not care. Rows of gate and up share a tile, or each warp would make both.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from clsa_cuda.kernels.float8 import halves, unpacked
from clsa_cuda.kernels.overlap import wait
from clsa_cuda.kernels.product import ProductTiles
from clsa_cuda.kernels.tiles import Limits, cdiv, next_power_of_2, remembered

_MAX_SPLITS = 6  # parts that the last program sums
_LEAST_BLOCKS = 4  # of K that a part has


@remembered
def float8_tiles(
    num_rows: int,
    out_size: int,
    in_size: int,
    swiglu: bool,
    device: Limits,
    block_k: int = 128,
    max_rows: int = 64,
) -> ProductTiles:
    """A tile of up to `max_rows` outputs for every multiprocessor, four warps for each 64 rows of weights.

    K is in so many parts that few rows of a tile stay empty: those cost as many instructions as the others.
    """
    block_k = min(block_k, max(32, next_power_of_2(in_size)))
    parts = 2 if swiglu else 1
    rows, splits = cdiv(out_size, device.sm_count), 1
    while not swiglu and splits < _MAX_SPLITS and in_size >= (splits + 1) * _LEAST_BLOCKS * block_k:
        wider = cdiv(out_size, max(1, device.sm_count // (splits + 1)))
        if wider > max_rows:
            break
        rows, splits = wider, splits + 1
    rows = cdiv(rows, cdiv(rows, max_rows))
    tiles = ProductTiles(rows, block_k, splits, num_stages=2)
    height, width = tiles.block_n * parts, max(16, next_power_of_2(num_rows))
    # Beside the stages, one of which is computed with, there are the tile that was read ahead and the halves of x.
    room = device.shared_memory - (height + 2 * width) * block_k - (16 << 10)
    stages = 1 + room // ((height + 2 * width + 2) * block_k)
    tiles = replace(tiles, num_stages=max(2, min(stages, cdiv(cdiv(in_size, block_k), splits))))
    if height < 128:
        return tiles
    # With so few registers two programs fit a multiprocessor: one ends while the next kernel's begins.
    fits = device.early_launch and block_k <= 128 and width <= 32
    return replace(tiles, num_warps=8, max_registers=128 if fits else None)


@triton.jit
def _add(acc, square, x_tile, words, norm_words, NORM: tl.constexpr):
    """One block of K in the sums: products with words [R, BLOCK_K / 4], squares of x by groups of 8 inputs."""
    BLOCK_M: tl.constexpr = x_tile.shape[1]
    HALF: tl.constexpr = x_tile.shape[0] // 2
    even, odd = tl.split(tl.permute(tl.reshape(x_tile, [HALF, 2, BLOCK_M]), 0, 2, 1))
    if NORM:
        even_norm, odd_norm = halves(norm_words)
        wide_even, wide_odd = even.to(tl.float32), odd.to(tl.float32)
        squares = wide_even * wide_even + wide_odd * wide_odd
        square += tl.sum(tl.reshape(squares, [square.shape[0], 4, BLOCK_M]), axis=1)
        even = (wide_even * even_norm.to(even.dtype, bitcast=True).to(tl.float32)[:, None]).to(even.dtype)
        odd = (wide_odd * odd_norm.to(odd.dtype, bitcast=True).to(tl.float32)[:, None]).to(odd.dtype)
    w_even, w_odd = unpacked(words, x_tile)
    acc = tl.dot(w_even, even, acc)
    acc = tl.dot(w_odd, odd, acc)
    return acc, square


@triton.jit
def float8_sums(
    x_rows,
    m_live,
    norm,  # [K / 2] int32, of two numbers each
    w,  # [N, K / 4] int32, with SWIGLU [2 N, K / 4]
    tile,
    N,
    first,
    stop,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """As `product.sums`, of the outputs of one tile."""
    R: tl.constexpr = 2 * BLOCK_N if SWIGLU else BLOCK_N
    row = tl.arange(0, R)
    n = tile * ROWS + row % BLOCK_N
    live = ((row % BLOCK_N < ROWS) & (n < N))[:, None]
    w_rows = w + tl.where(n < N, n + row // BLOCK_N * N, 0).to(tl.int64)[:, None] * (K // 4)
    i, i2, i4 = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // 4)
    k, k2, k4 = first * BLOCK_K + i, first * (BLOCK_K // 2) + i2, first * (BLOCK_K // 4) + i4
    EVEN: tl.constexpr = K % BLOCK_K == 0
    # The first weights come while the kernel in front still makes x, and are used last.
    w_first = tl.load(w_rows + k4[None, :], mask=live & (k4 < K // 4)[None, :], other=0)
    norm_first = w_first
    if NORM:
        norm_first = tl.load(norm + k2, mask=k2 < K // 2, other=0)
    wait(OVERLAP)
    x_first = tl.load(x_rows + k[:, None], mask=m_live[None, :] & (k < K)[:, None], other=0.0)
    acc = tl.zeros([R, BLOCK_M], tl.float32)
    square = tl.zeros([BLOCK_K // 8, BLOCK_M], tl.float32)
    for block in tl.range(first + 1, stop, num_stages=STAGES):
        k, k2, k4 = block * BLOCK_K + i, block * (BLOCK_K // 2) + i2, block * (BLOCK_K // 4) + i4
        x_live, w_live = m_live[None, :], live
        if not EVEN:
            x_live, w_live = x_live & (k < K)[:, None], w_live & (k4 < K // 4)[None, :]
        x_tile = tl.load(x_rows + k[:, None], mask=x_live, other=0.0)
        words = tl.load(w_rows + k4[None, :], mask=w_live, other=0)
        norm_words = words
        if NORM:  # by words, or they are too short to be fetched ahead of their use
            norm_words = tl.load(norm + k2) if EVEN else tl.load(norm + k2, mask=k2 < K // 2, other=0)
        acc, square = _add(acc, square, x_tile, words, norm_words, NORM)
    acc, square = _add(acc, square, x_first, w_first, norm_first, NORM)
    up_acc = acc
    if SWIGLU:
        acc, up_acc = tl.split(tl.permute(tl.reshape(acc, [2, BLOCK_N, BLOCK_M]), 1, 2, 0))
    return acc, up_acc, tl.sum(square, axis=0)
