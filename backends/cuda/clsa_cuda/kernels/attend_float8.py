"""Decode attention over rows that are kept in E4M3: `attend` with numbers read two at a time.

Tensor cores take E4M3 only from both sides, and 8-bit numbers cannot be transposed on their way out of shared memory.
So rows are read as 16-bit words of two numbers, words are transposed, and each word becomes two float16 numbers in
registers, which is exact. Even dimensions and odd ones are products of their own. Queries become float16 too, divided
by a power of two, so that nothing of them is lost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clsa_cuda.kernels.attend import rows_of_block, share
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.merge import merge_splits
from clsa_cuda.kernels.overlap import wait


@triton.jit
def _lower(words, NATIVE: tl.constexpr):
    """The E4M3 numbers in the lower halves of int16 words, in float16."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 p; .reg .b16 a, b; prmt.b32 p, $1, 0, 0x0020; mov.b32 {a, b}, p; cvt.rn.f16x2.e4m3x2 $0, a; }",
            "=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _upper(words, NATIVE: tl.constexpr):
    """Those in the upper halves."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 p; .reg .b16 a, b; prmt.b32 p, $1, 0, 0x0031; mov.b32 {a, b}, p; cvt.rn.f16x2.e4m3x2 $0, a; }",
            "=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return ((words >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _scale_of(even, odd):
    """A power of two near the largest number of each row: what is divided by it fits a float16. float32, [BLOCK_H]."""
    largest = tl.maximum(tl.max(tl.abs(even), axis=1), tl.max(tl.abs(odd), axis=1))
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 1.1754943508222875e-38)
    return tl.where(power == float("inf"), 1.0, power)


@triton.jit
def divided(heads, mask, scale):
    """Even and odd dimensions of queries [BLOCK_H, WORDS] in float16, divided by powers of two; what scores then need.

    `heads`: where the even ones are.
    """
    even = tl.load(heads, mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(heads + 1, mask=mask, other=0.0).to(tl.float32)
    power = _scale_of(even, odd)
    return (even / power[:, None]).to(tl.float16), (odd / power[:, None]).to(tl.float16), power * scale


@triton.jit
def attend_to_words(q_even, q_odd, k_words, v_words, visible, scale, even, odd, total, highest, NATIVE: tl.constexpr):
    """One block of keys [BLOCK_N, WORDS] in the running softmax of a tile of heads."""
    scores = tl.dot(q_even, tl.trans(_lower(k_words, NATIVE)))
    scores = tl.dot(q_odd, tl.trans(_upper(k_words, NATIVE)), scores)
    scores = tl.where(visible, scores * scale[:, None], float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # -inf - -inf is NaN
    weights = tl.exp2(scores - reference[:, None])
    keep = tl.exp2(highest - reference)
    total = total * keep + tl.sum(weights, axis=1)
    weights = weights.to(tl.float16)
    even = tl.dot(weights, _lower(v_words, NATIVE), even * keep[:, None])
    odd = tl.dot(weights, _upper(v_words, NATIVE), odd * keep[:, None])
    return even, odd, total, new_highest


@launcher
@triton.jit(do_not_specialize=["splits"])
def _attend_float8_kernel(
    q,  # [T, H, D]
    k,  # [N, G, D / 2] int16 of two E4M3 numbers
    v,  # [N, G, D / 2] likewise
    rows,  # as for `_attend_kernel`
    lengths,
    out,  # [T, H, D]
    partial,  # [T, H, splits, D] float32 scratch
    sums,  # [T, H, splits] float32 scratch
    arrived,  # [T * G] int32, zeros before and after
    H,
    q_stride,
    k_stride,  # in words
    v_stride,
    rows_stride,
    scale,  # log2(e) / sqrt(D)
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REPEAT: tl.constexpr,  # query heads of a KV head
    KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    SOURCE: tl.constexpr,  # "list" or "block"
    SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    FRESH: tl.constexpr,
    MERGED: tl.constexpr,
    NATIVE: tl.constexpr,  # whether the device converts two numbers in an instruction (the interpreter has none)
    OVERLAP: tl.constexpr,
):
    """Program (t * KV_HEADS + g, split): the query heads of a KV head, over a share of the keys."""
    if FRESH:
        wait(OVERLAP)
    t = tl.program_id(0).to(tl.int64) // KV_HEADS
    g = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    h = tl.arange(0, BLOCK_H)
    WORDS: tl.constexpr = BLOCK_D // 2
    w = tl.arange(0, WORDS)
    w_mask = (w < D // 2)[None, :]
    base = t * SIZE
    if SOURCE == "list":
        count = SIZE
        rows += t * rows_stride
    else:
        count = tl.load(lengths + t)
    num_blocks = tl.cdiv(count, BLOCK_N)
    first, stop = share(num_blocks, split, splits)
    place = g * (D // 2) + w[None, :]
    # The first keys, while the kernel in front still makes the queries. An empty split asks for keys that are there.
    start = tl.minimum(first, tl.maximum(num_blocks - 1, 0)) * BLOCK_N
    row, seen = rows_of_block(start, count, base, rows, 0, BLOCK_N, SOURCE, SIZE)
    seen &= first < stop
    k_first = tl.load(k + row[:, None] * k_stride + place, mask=seen[:, None] & w_mask, other=0)
    v_first = tl.load(v + row[:, None] * v_stride + place, mask=seen[:, None] & w_mask, other=0)
    if SOURCE == "list":  # not before: the first keys need not wait for it
        stop = tl.minimum(stop, tl.cdiv(tl.load(lengths + t), BLOCK_N))
    if not FRESH:
        wait(OVERLAP)

    first_head = t * H + g * REPEAT
    head = first_head + h
    q_mask = (h < REPEAT)[:, None] & w_mask
    heads = q + t * q_stride + (g * REPEAT + h)[:, None] * D + 2 * w[None, :]
    q_even, q_odd, power = divided(heads, q_mask, scale)
    even = tl.zeros([BLOCK_H, WORDS], tl.float32)
    odd = tl.zeros([BLOCK_H, WORDS], tl.float32)
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    even, odd, total, highest = attend_to_words(
        q_even, q_odd, k_first, v_first, seen[None, :], power, even, odd, total, highest, NATIVE
    )
    for block in tl.range(first + 1, stop, num_stages=STAGES):
        row, seen = rows_of_block(block * BLOCK_N, count, base, rows, 0, BLOCK_N, SOURCE, SIZE)
        mask = seen[:, None]
        if BLOCK_D != D:
            mask = mask & w_mask
        k_words = tl.load(k + row[:, None] * k_stride + place, mask=mask, other=0)
        v_words = tl.load(v + row[:, None] * v_stride + place, mask=mask, other=0)
        even, odd, total, highest = attend_to_words(
            q_even, q_odd, k_words, v_words, seen[None, :], power, even, odd, total, highest, NATIVE
        )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    even, odd = even / divisor, odd / divisor
    if not SPLIT:
        to = out + head[:, None] * D + 2 * w[None, :]
        tl.store(to, even.to(out.dtype.element_ty), mask=q_mask)
        tl.store(to + 1, odd.to(out.dtype.element_ty), mask=q_mask)
    else:
        to = partial + (head * splits + split)[:, None] * D + 2 * w[None, :]
        tl.store(to, even, mask=q_mask)
        tl.store(to + 1, odd, mask=q_mask)
        tl.store(sums + head * splits + split, highest + tl.log2(total), mask=h < REPEAT)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
            at = first_head * splits
            merge_splits(partial + at * D, sums + at, out + first_head * D, splits, splits, REPEAT, D, BLOCK_D, MERGED)
            tl.store(arrived + tl.program_id(0), 0)
