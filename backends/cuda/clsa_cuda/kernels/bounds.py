"""What min-p, top-k and top-p keep of each row, without sorting it: the lowest logit that stays.

Both top-k and top-p ask for the lowest value such that what lies strictly above it weighs less than a target: every
logit weighs 1, and the target is k; or it weighs its probability, and the target is p of all that is kept. The value is
found digit by digit in the order of float32, four bits a launch: programs add up the weights of each digit among the
values that agree in all digits before, and the last of a row chooses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.ops import SamplingBatch
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters, wait
from clsa_cuda.kernels.tiles import Limits, cdiv, launch_options, limits

BLOCK = 1024  # logits that a program adds up at once
PER_PROGRAM = 2048
MAX_SPLITS = 128
_DIGITS = tl.constexpr(16)
_SHIFTS = range(28, -4, -4)


def splits_of(vocab_size: int) -> int:
    """Programs of a row. They follow from its length alone, so that a row's sums do not depend on other rows."""
    return min(MAX_SPLITS, max(1, cdiv(vocab_size, PER_PROGRAM)))


def row_options(device: Limits) -> dict[str, object]:
    """How kernels over parts of rows are launched."""
    return {
        "BLOCK": BLOCK,
        "MAX_SPLITS": MAX_SPLITS,
        "OVERLAP": device.early_launch,
        "num_warps": 4,
        **launch_options(device),
    }


@triton.jit
def in_order(x):
    """uint32 in the order of float32: -0.0 equals 0.0; NaN, which makes a row invalid, comes anywhere."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _from_order(u):
    """The float32 that u stands for; -inf for what lies below all of them, where no value weighs enough."""
    bits = tl.where((u >> 31) != 0, u & 0x7FFFFFFF, u ^ 0xFFFFFFFF)
    return tl.where(u < 0x007FFFFF, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _share(V, splits, BLOCK: tl.constexpr):
    """First and end of this program's part of a row."""
    per_split = tl.cdiv(tl.cdiv(V, splits), BLOCK) * BLOCK
    first = tl.program_id(1) * per_split
    return first, tl.minimum(first + per_split, V)


@launcher
@triton.jit
def _highest_kernel(
    z,  # [R, V]
    temperature,  # [R]
    min_p,  # [R]
    highest,  # [R] out: the best logit
    bound,  # [R] out: the lowest that min-p keeps
    partial,  # [R, splits] scratch
    arrived,  # [R] int32, zeros before and after
    V,
    splits,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (r, split)."""
    wait(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    first, stop = _share(V, splits, BLOCK)
    found = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(first, stop, BLOCK):
        i = start + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.load(z + r * V + i, mask=i < stop, other=float("-inf")))
    tl.store(partial + r * splits + tl.program_id(1), tl.max(found))
    tl.debug_barrier()  # all of this program's stores come before its arrival
    if tl.atomic_add(arrived + r, 1, sem="acq_rel") == splits - 1:
        s = tl.arange(0, MAX_SPLITS)
        parts = tl.load(partial + r * splits + s, mask=s < splits, other=float("-inf"), cache_modifier=".cg")
        best = tl.max(parts)
        tl.store(highest + r, best)
        tl.store(bound + r, best + tl.load(temperature + r) * tl.log(tl.load(min_p + r)))  # log 0 = -inf: off
        tl.store(arrived + r, 0)


@triton.jit
def _agreeing(z, start, stop, lowest, known, SHIFT: tl.constexpr, LENGTH: tl.constexpr):
    """Logits of a row from `start`, in order too, and which of them are kept and agree in all digits before SHIFT."""
    i = start + tl.arange(0, LENGTH)
    x = tl.load(z + i, mask=i < stop, other=float("-inf"))
    u = in_order(x)
    live = (i < stop) & (x >= lowest)
    if SHIFT < 28:
        live = live & ((u >> (SHIFT + 4)) == (known >> (SHIFT + 4)))
    return x, u, live


@launcher
@triton.jit
def _digit_kernel(
    z,  # [R, V]
    temperature,  # [R]
    wanted,  # [R]: k or p
    highest,  # [R]
    bound,  # [R] in and, after the last digit, out
    prefix,  # [R] int32, the bits of an uint32: the digits found so far
    above,  # [R] float32: what weighs more than those can
    target,  # [R] float32
    partial,  # [R, splits, DIGITS] float32 scratch
    arrived,  # [R] int32, zeros before and after
    V,
    splits,
    SHIFT: tl.constexpr,
    BY_COUNT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (r, split): the weights of each value of the digit at SHIFT, and the last one's choice."""
    wait(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    limit = tl.load(wanted + r)
    heat = tl.load(temperature + r)
    if BY_COUNT:
        asked = (limit > 0) & (limit < V)
    else:
        asked = limit < 1.0
    if asked & (heat > 0.0):
        lowest = tl.load(bound + r)
        best = tl.load(highest + r)
        FIRST: tl.constexpr = SHIFT == 28
        known = tl.zeros([], tl.uint32)
        if not FIRST:
            known = tl.load(prefix + r).to(tl.uint32, bitcast=True)
        digits = tl.arange(0, _DIGITS)
        sums = tl.zeros([_DIGITS], tl.float32)
        first, stop = _share(V, splits, BLOCK)
        for begin in range(first, stop, WIDE):
            # Most parts hold nothing that agrees in the digits before: one look at many logits, all read at once.
            _x, _u, some = _agreeing(z + r * V, begin, stop, lowest, known, SHIFT, WIDE)
            if tl.max(some.to(tl.int32)) > 0:
                for start in range(begin, tl.minimum(begin + WIDE, stop), BLOCK):
                    x, u, live = _agreeing(z + r * V, start, stop, lowest, known, SHIFT, BLOCK)
                    if tl.max(live.to(tl.int32)) > 0:
                        weight = tl.where(live, 1.0, 0.0)
                        if not BY_COUNT:
                            weight = tl.where(live, tl.exp((x - best) / heat), 0.0)
                        digit = ((u >> SHIFT) & 15).to(tl.int32)
                        sums += tl.sum(tl.where(digit[None, :] == digits[:, None], weight[None, :], 0.0), axis=1)
        tl.store(partial + (r * splits + tl.program_id(1)) * _DIGITS + digits, sums)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(arrived + r, 1, sem="acq_rel") == splits - 1:
            s = tl.arange(0, MAX_SPLITS)
            place = (r * splits + s)[:, None] * _DIGITS + digits[None, :]
            parts = tl.load(partial + place, mask=(s < splits)[:, None], other=0.0, cache_modifier=".cg")
            total = tl.sum(parts, axis=0)
            if FIRST:
                more = tl.zeros([], tl.float32)
                goal = limit.to(tl.float32)
                if not BY_COUNT:
                    goal = limit * tl.sum(total)
                tl.store(target + r, goal)
            else:
                more = tl.load(above + r)
                goal = tl.load(target + r)
            # Of each digit, what weighs more than all values with it.
            higher = tl.where(digits[None, :] > digits[:, None], total[None, :], 0.0)
            over = more + tl.sum(higher, axis=1)
            chosen = tl.min(tl.where(over < goal, digits, _DIGITS - 1))
            known = known | (chosen.to(tl.uint32) << SHIFT)
            tl.store(prefix + r, known.to(tl.int32, bitcast=True))
            tl.store(above + r, tl.sum(tl.where(digits == chosen, over, 0.0)))
            if SHIFT == 0:
                tl.store(bound + r, tl.maximum(lowest, _from_order(known)))
            tl.store(arrived + r, 0)


def lowest_kept(z: Tensor, sampling: SamplingBatch) -> Tensor:
    """The lowest logit of each row [R, V] float32 that min-p, then top-k, then top-p keep: [R] float32.

    Rows without temperature have none, nor have those whose best logit is not finite.
    """
    num_rows, vocab_size = z.shape
    assert z.dtype == torch.float32 and z.is_contiguous() and num_rows <= MAX_ARRIVALS
    splits, device = splits_of(vocab_size), limits(z.device)
    highest, bound, above, target = torch.empty(4, num_rows, dtype=torch.float32, device=z.device).unbind()
    prefix = torch.empty(num_rows, dtype=torch.int32, device=z.device)
    partial = torch.empty(num_rows, splits, _DIGITS.value, dtype=torch.float32, device=z.device)
    arrived, options = arrival_counters(z.device), row_options(device)
    _highest_kernel[num_rows, splits](
        z, sampling.temperature, sampling.min_p, highest, bound, partial, arrived, vocab_size, splits, **options
    )
    for wanted, by_count in ((sampling.top_k, True), (sampling.top_p, False)):
        for shift in _SHIFTS:
            _digit_kernel[num_rows, splits](
                z,
                sampling.temperature,
                wanted,
                highest,
                bound,
                prefix,
                above,
                target,
                partial,
                arrived,
                vocab_size,
                splits,
                SHIFT=shift,
                BY_COUNT=by_count,
                WIDE=PER_PROGRAM,
                **options,
            )
    return bound
