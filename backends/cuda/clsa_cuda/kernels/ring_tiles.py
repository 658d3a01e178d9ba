"""How products on Hopper are cut (see `ring_product`): outputs for every multiprocessor, a ring that fills its memory.

Measured on an H200 in chains of a step's layers (`scripts/gpu_layers.py`, docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clsa.ops import Float8Weight, Weight
from clsa_cuda.kernels.tiles import Limits, cdiv, next_power_of_2, remembered

BLOCK_N = 64  # outputs of a tile: what one warp group multiplies at once
_MAX_STAGES = 9
_BLOCKS = (256, 128, 64)  # inputs of a tile: long ones take fewer turns of the loop, short ones are there sooner
_MAX_STAGE = 40 << 10  # bytes of a turn of the loop, unless there are
_FEW_TURNS = 5  # of them or less
_MAX_SQUARES = 8192  # of a tile of x, which stay in registers where there is a norm
_MAX_IN_TWO = 16  # rows of x that every program splits for 8-bit weights
_MAX_IN_TWO_OF_GATE = 32  # where there are twice as many weights for each


@dataclass(frozen=True, slots=True)
class RingTiles:
    """How a product is cut: `rows` outputs by a part of K for each of `units(out_size)` programs."""

    rows: int  # outputs of a tile, at most BLOCK_N
    block_k: int
    splits: int  # parts of K
    num_stages: int  # tiles of weights, and of x, in the rings

    def units(self, out_size: int) -> int:
        return cdiv(out_size, self.rows) * self.splits

    def scratch(self, out_size: int, block_m: int) -> int:
        """Floats that the parts of K need: sums, and squares of the norm."""
        return 0 if self.splits == 1 else self.units(out_size) * block_m * (BLOCK_N + 1)


def block_of_rows(num_rows: int) -> int:
    return max(8, next_power_of_2(num_rows))


def ring_bytes(block_m: int, block_k: int, swiglu: bool, norm: bool, itemsize: int = 2) -> int:
    """Of one stage of weights of `itemsize` bytes and of x."""
    return block_k * (itemsize * BLOCK_N * (2 if swiglu else 1) + 2 * (block_m + norm))


@remembered
def ring_tiles(
    num_rows: int, out_size: int, in_size: int, swiglu: bool, norm: bool, device: Limits, itemsize: int = 2
) -> RingTiles | None:
    """A tile for every multiprocessor and a ring that fills it; None where K has no such tiles, or `product` is faster.

    With more outputs than one wave of tiles holds, two programs share a multiprocessor: one begins as the other ends.
    Measured on an H200 (docs/log.md).
    """
    block_m = block_of_rows(num_rows)
    if itemsize == 1 and block_m > (_MAX_IN_TWO_OF_GATE if swiglu else _MAX_IN_TWO):
        return None
    splits = 1
    if not swiglu and in_size >= 1024:
        splits = next((parts for parts in (3, 2) if cdiv(parts * out_size, device.sm_count) <= BLOCK_N), 1)
    rows = cdiv(out_size * splits, device.sm_count)
    waves = cdiv(rows, BLOCK_N)
    room = device.shared_memory // min(waves, 2) - 2048
    for block_k in _BLOCKS:
        stage = ring_bytes(block_m, block_k, swiglu, norm, itemsize)
        turns = cdiv(in_size // block_k, splits)
        if norm and block_m * block_k > _MAX_SQUARES:
            continue
        operands = 2 * block_m * block_k if itemsize == 1 else 0
        stages = min(_MAX_STAGES, turns, (room - operands) // stage)
        if in_size % block_k == 0 and stages >= 3 and (stage <= _MAX_STAGE or turns <= _FEW_TURNS):
            return RingTiles(cdiv(rows, waves), block_k, splits, stages)
        if itemsize * block_k <= 128:  # what a row of a tile has at least
            break
    return None


def aligned(x: Tensor) -> bool:
    """Whether its rows can be copied 16 bytes at a time."""
    return x.data_ptr() % 16 == 0 and x.stride(-1) == 1


def tiles_for(x: Tensor, weight: Weight, swiglu: bool, norm: Tensor | None, device: Limits) -> RingTiles | None:
    """How to cut what `linear.takes` took; None: `product` has to do it."""
    w = weight.values if isinstance(weight, Float8Weight) else weight
    if not device.hopper or not aligned(w) or not (norm is None or aligned(norm)):
        return None
    if isinstance(weight, Float8Weight) and x.dtype != torch.bfloat16:
        return None  # `ring_product` would lose bits of a float16
    out_size = w.shape[0] // 2 if swiglu else w.shape[0]
    return ring_tiles(x.shape[0], out_size, x.shape[1], swiglu, norm is not None, device, w.itemsize)
