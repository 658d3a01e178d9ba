"""`sample` of rows with a temperature: noise and the best of what is left, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.ops import SamplingBatch
from clsa_cuda.kernels.bounds import in_order, lowest_kept, row_options, splits_of
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters, wait
from clsa_cuda.kernels.tiles import limits


@triton.jit
def _mix(x, y, ROTATION: tl.constexpr):
    x += y
    return x, ((y << ROTATION) | (y >> (32 - ROTATION))) ^ x


@triton.jit
def _four_rounds(x, y, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    x, y = _mix(x, y, A)
    x, y = _mix(x, y, B)
    x, y = _mix(x, y, C)
    return _mix(x, y, D)


@triton.jit
def threefry(low, high, x, y):
    """First word of Threefry-2x32 with 20 rounds (Salmon et al. 2011): key (low, high), counter (x, y), all uint32."""
    third = low ^ high ^ 0x1BD11BDA
    x += low
    y += high
    x, y = _four_rounds(x, y, 13, 15, 26, 6)
    x, y = _four_rounds(x + high, y + (third + 1), 17, 29, 16, 24)
    x, y = _four_rounds(x + third, y + (low + 2), 13, 15, 26, 6)
    x, y = _four_rounds(x + low, y + (high + 3), 17, 29, 16, 24)
    x, y = _four_rounds(x + high, y + (third + 4), 13, 15, 26, 6)
    return x + third


@launcher
@triton.jit
def _draw_kernel(
    logits,  # [R, V], which say whether there is anything to sample from
    z,  # [R, V]: the same, or penalised
    temperature,  # [R]
    bound,  # [R], FILTERED only
    seed,  # [R, 2] int64: low and high word
    positions,  # [R]
    tokens,  # [R] out
    best,  # [R, splits] int64 scratch
    finite,  # [R, splits] int32 scratch
    arrived,  # [R] int32, zeros before and after
    V,
    splits,
    FILTERED: tl.constexpr,
    PENALISED: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (r, split): the best of a part of row r, and its token in the low word, so that ties go down."""
    wait(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    heat = tl.load(temperature + r)
    is_random = heat > 0.0
    lowest = float("-inf")
    if FILTERED:
        lowest = tl.load(bound + r)
    low = tl.load(seed + 2 * r).to(tl.uint32)
    high = tl.load(seed + 2 * r + 1).to(tl.uint32)
    position = tl.load(positions + r).to(tl.uint32, bitcast=True)
    per_split = tl.cdiv(tl.cdiv(V, splits), BLOCK) * BLOCK
    stop = tl.minimum((split + 1) * per_split, V)
    found = tl.full([BLOCK], 0, tl.int64)
    nothing = tl.full([BLOCK], 0, tl.int32)  # 1: NaN or +inf, 2: a finite logit
    for start in range(split * per_split, stop, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < stop
        x = tl.load(logits + r * V + i, mask=mask, other=float("-inf"))
        nothing = nothing | tl.where((x != x) | (x == float("inf")), 1, tl.where(x == float("-inf"), 0, 2))
        if PENALISED:
            x = tl.load(z + r * V + i, mask=mask, other=float("-inf"))
        if is_random:
            kept = x >= lowest
            if tl.max(kept.to(tl.int32)) > 0:  # the noise is most of the work, and filters leave few logits
                bits = threefry(low, high, position + tl.zeros([BLOCK], tl.uint32), i.to(tl.uint32, bitcast=True))
                uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)  # 24 significant bits: exact
                x = x / heat - tl.log(-tl.log(uniform))
            x = tl.where(kept, x, float("-inf"))
        key = (in_order(x).to(tl.int64) << 31) + (V - i)  # V fits 31 bits, so the sign stays clear
        found = tl.maximum(found, tl.where(mask, key, 0))
    tl.store(best + r * splits + split, tl.max(found))
    tl.store(finite + r * splits + split, tl.reduce(nothing, 0, _either))
    tl.debug_barrier()  # all of this program's stores come before its arrival
    if tl.atomic_add(arrived + r, 1, sem="acq_rel") == splits - 1:
        s = tl.arange(0, MAX_SPLITS)
        parts = tl.load(best + r * splits + s, mask=s < splits, other=0, cache_modifier=".cg")
        flags = tl.load(finite + r * splits + s, mask=s < splits, other=0, cache_modifier=".cg")
        token = V - (tl.max(parts) & 0x7FFFFFFF).to(tl.int32)
        tl.store(tokens + r, tl.where(tl.reduce(flags, 0, _either) == 2, token, -1))
        tl.store(arrived + r, 0)


@triton.jit
def _either(a, b):
    return a | b


def draw(logits: Tensor, z: Tensor, sampling: SamplingBatch) -> Tensor:
    """Tokens [R] int32 of rows [R, V] float32, greedy ones among them. `z`: the logits, or penalised ones."""
    num_rows, vocab_size = logits.shape
    assert logits.dtype == z.dtype == torch.float32 and logits.is_contiguous() and z.is_contiguous()
    assert num_rows <= MAX_ARRIVALS and sampling.seed.dtype == torch.int64
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return tokens
    splits = splits_of(vocab_size)
    bound = lowest_kept(z, sampling) if sampling.any_filter else sampling.temperature
    _draw_kernel[num_rows, splits](
        logits,
        z,
        sampling.temperature,
        bound,
        sampling.seed,
        sampling.positions,
        tokens,
        torch.empty(num_rows, splits, dtype=torch.int64, device=logits.device),
        torch.empty(num_rows, splits, dtype=torch.int32, device=logits.device),
        arrival_counters(logits.device),
        vocab_size,
        splits,
        FILTERED=sampling.any_filter,
        PENALISED=z is not logits,
        **row_options(limits(logits.device)),
    )
    return tokens
