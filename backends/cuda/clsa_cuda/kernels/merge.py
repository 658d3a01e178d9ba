"""How the results of a query's splits become one: by the program of decode attention that ends last."""

from __future__ import annotations

import triton
import triton.language as tl

from clsa_cuda.kernels.tiles import next_power_of_2


def merged(splits: int, programs: int, heads: int, head_dim: int, num_warps: int, sm_count: int) -> int:
    """How many splits the last program reads at once: each round is a trip to L2, and what is read are registers.

    Programs that share a multiprocessor, as they do where they are more than those, can spare a quarter of them. A
    query that fills an H200 alone has 33 splits, one round. Each value is a kernel more to compile.
    """
    registers = 132 if programs <= sm_count else 34  # of a thread, beside those it has anyway
    most = registers * 32 * num_warps // (next_power_of_2(heads) * next_power_of_2(head_dim))
    counts = [n for n in (2, 4, 8, 17, 33) if n <= most] or [1]
    return next((n for n in counts if n >= splits), counts[-1])


@triton.jit
def merge_splits(
    partial,  # of the first of the rows
    sums,
    out,
    splits,
    row_step,  # results from a head's first to that of the next
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,  # so many splits' loads in flight
):
    """Write the heads of one tile from the results of all splits, in their order."""
    BLOCK_H: tl.constexpr = triton.next_power_of_2(HEADS)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    there = h < HEADS
    mask = there[:, None] & (d < D)[None, :]
    tile = h[:, None] * row_step * D + d[None, :]
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    MANY: tl.constexpr = UNROLL > 4
    for start in range(0, splits, UNROLL):
        # All loads first: one trip. Every lane gets each sum, to weigh what is its own of the parts. Many sums are read
        # once more with a lane each, which share the work of maximum and total; and that first, for Triton lays out the
        # others as what it meets first, and would move every weight. .cg: from L2, where the stores are.
        parts, shares, spread = (), (), ()
        for first in tl.static_range(0, UNROLL if MANY else 0, 32):
            j = first + tl.arange(0, 32)[None, :]
            live = there[:, None] & (j < UNROLL) & (start + j < splits)
            at = sums + h[:, None] * row_step + start + j
            spread += (tl.load(at, mask=live, other=float("-inf"), cache_modifier=".cg"),)  # type: ignore[assignment]
        for j in tl.static_range(UNROLL):
            i = start + j
            live = i < splits
            part = tl.load(partial + tile + i * D, mask=mask & live, other=0.0, cache_modifier=".cg")
            at = sums + h * row_step + i
            share = tl.load(at, mask=there & live, other=float("-inf"), cache_modifier=".cg")
            parts += (part,)  # type: ignore[assignment]
            shares += (share,)  # type: ignore[assignment]

        before = highest
        if MANY:
            for first in tl.static_range(0, UNROLL, 32):
                highest = tl.maximum(highest, tl.max(spread[first // 32], axis=1))
        else:
            for j in tl.static_range(UNROLL):
                highest = tl.maximum(highest, shares[j])
        reference = tl.where(highest == float("-inf"), 0.0, highest)  # -inf - -inf is NaN
        keep = tl.exp2(before - reference)
        acc = acc * keep[:, None]
        total = total * keep
        for j in tl.static_range(UNROLL):
            weight = tl.exp2(shares[j] - reference)
            acc += parts[j] * weight[:, None]
            if not MANY:
                total += weight
        for first in tl.static_range(0, UNROLL if MANY else 0, 32):
            total += tl.sum(tl.exp2(spread[first // 32] - reference[:, None]), axis=1)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + h[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
