"""Decode attention over all pages of a sequence: one kernel whose programs share the work evenly.

All blocks of keys of all queries and KV heads are one line, query after query. Each program takes an equal piece of it,
whatever the lengths of the sequences are, and wherever one query ends and the next begins; padded rows have no part in
it. (With a number of programs for each query, most multiprocessors idle where lengths differ: docs/log.md, 2026-11-29.)
A query whose blocks lie in several pieces is merged by the last of their programs, as in `attend`. So the last bits of
a result may depend on the lengths of the other sequences of a step, but not on what runs when.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clsa_cuda.kernels.attend import attend_to
from clsa_cuda.kernels.attend_float8 import attend_to_words, divided
from clsa_cuda.kernels.float8 import widened
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.merge import merge_splits
from clsa_cuda.kernels.overlap import wait


@triton.jit
def _rows_of_pages(start, count, table, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """Physical rows of the keys of a block from `start`, and which of them are there; `table` is the sequence's row."""
    i = start + tl.arange(0, BLOCK_N)
    seen = i < count
    if BLOCK_N <= PAGE:
        return tl.load(table + start // PAGE).to(tl.int64) * PAGE + start % PAGE + tl.arange(0, BLOCK_N), seen
    return tl.load(table + i // PAGE, mask=seen, other=0).to(tl.int64) * PAGE + i % PAGE, seen


@triton.jit
def _attend_piece(
    q,  # the query heads of a KV head
    k,  # its head of every row
    v,
    table,
    count,
    first,
    stop,
    k_stride,
    v_stride,
    scale,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Blocks `first` to `stop` of a query's keys: weighted values, softmax sum and its reference."""
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    d_mask = (d < D)[None, :]
    q_tile = tl.load(q + h[:, None] * D + d[None, :], mask=(h < REPEAT)[:, None] & d_mask, other=0.0)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for block in tl.range(first, stop, num_stages=STAGES):
        row, seen = _rows_of_pages(block * BLOCK_N, count, table, BLOCK_N, PAGE)
        mask = seen[:, None]
        if BLOCK_D != D:
            mask = mask & d_mask
        k_tile = widened(tl.load(k + row[:, None] * k_stride + d[None, :], mask=mask, other=0.0), q_tile)
        v_tile = widened(tl.load(v + row[:, None] * v_stride + d[None, :], mask=mask, other=0.0), q_tile)
        acc, total, highest = attend_to(q_tile, k_tile, v_tile, seen[None, :], scale, acc, total, highest)
    return acc, total, highest


@triton.jit
def _attend_piece_of_words(
    q,
    k,  # int16 words of two E4M3 numbers, as in `attend_float8`; strides are in words
    v,
    table,
    count,
    first,
    stop,
    k_stride,
    v_stride,
    scale,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    STAGES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The same of rows in E4M3."""
    WORDS: tl.constexpr = BLOCK_D // 2
    h, w = tl.arange(0, BLOCK_H), tl.arange(0, WORDS)
    w_mask = (w < D // 2)[None, :]
    q_even, q_odd, scales = divided(q + h[:, None] * D + 2 * w[None, :], (h < REPEAT)[:, None] & w_mask, scale)
    even = tl.zeros([BLOCK_H, WORDS], tl.float32)
    odd = tl.zeros([BLOCK_H, WORDS], tl.float32)
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for block in tl.range(first, stop, num_stages=STAGES):
        row, seen = _rows_of_pages(block * BLOCK_N, count, table, BLOCK_N, PAGE)
        mask = seen[:, None]
        if BLOCK_D != D:
            mask = mask & w_mask
        k_words = tl.load(k + row[:, None] * k_stride + w[None, :], mask=mask, other=0)
        v_words = tl.load(v + row[:, None] * v_stride + w[None, :], mask=mask, other=0)
        even, odd, total, highest = attend_to_words(
            q_even, q_odd, k_words, v_words, seen[None, :], scales, even, odd, total, highest, NATIVE
        )
    return tl.reshape(tl.join(even, odd), [BLOCK_H, BLOCK_D]), total, highest


@triton.jit
def _piece_at(at, ends, total, programs, positions, sequence, table_stride, num_queries, KV_HEADS: tl.constexpr):
    """Of the block at `at`: query, KV head, where that head's blocks begin and how many they are; then the query's keys
    and its row of the page table; the first program that has a piece of the head's blocks, and how many have one.
    """
    query = tl.minimum(tl.sum((ends <= at).to(tl.int32), axis=0), num_queries - 1)  # any query behind the last block
    begin = tl.max(tl.where(ends <= at, ends, 0), axis=0)
    of_head = tl.maximum((tl.min(tl.where(ends > at, ends, 0x7FFFFFFF), axis=0) - begin) // KV_HEADS, 1)
    g = (at - begin) // of_head
    begin += g * of_head
    count = tl.load(positions + query) + 1
    table = tl.load(sequence + query).to(tl.int64) * table_stride
    # Program i has what lies from total * i // programs on.
    lowest = ((begin.to(tl.int64) + 1) * programs - 1) // total
    highest = ((begin + of_head).to(tl.int64) * programs - 1) // total
    return query, g, begin, of_head, count, table, lowest.to(tl.int32), (highest - lowest + 1).to(tl.int32)


@launcher
@triton.jit(do_not_specialize=["num_queries"])
def _attend_pages_kernel(
    q,  # [T, H, D]
    k,  # [N, G, D], or [N, G, D / 2] int16 of two E4M3 numbers; strides are in what it has
    v,  # likewise
    block_table,  # [B, M] int32
    positions,  # [T] int32, -1 for a query that sees nothing
    sequence,  # [T] int32
    out,  # [T, H, D]
    partial,  # [REPEAT, 2 * programs, D] float32 scratch
    sums,  # [REPEAT, 2 * programs] float32 scratch
    arrived,  # [programs] int32, zeros before and after
    num_queries,
    H,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    scale,  # log2(e) / sqrt(D)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REPEAT: tl.constexpr,  # query heads of a KV head
    KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,  # T, to the next power of two
    PAGE: tl.constexpr,
    STAGES: tl.constexpr,
    MERGED: tl.constexpr,  # results that are read at once when they are merged
    WORDS: tl.constexpr,  # whether k and v are words of two numbers
    NATIVE: tl.constexpr,  # as for `_attend_float8_kernel`
    OVERLAP: tl.constexpr,
):
    """Program i: the i-th piece of all blocks. What is read before the wait is there long before the queries are."""
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    mask = (h < REPEAT)[:, None] & (d < D)[None, :]
    i = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    blocks = tl.cdiv(tl.load(positions + t, mask=t < num_queries, other=-1) + 1, BLOCK_N)
    unseeing = tl.sum(((blocks == 0) & (t < num_queries)).to(tl.int32), axis=0)
    ends = tl.cumsum(blocks * KV_HEADS, axis=0)  # of the work of each query
    behind = tl.max(ends, axis=0).to(tl.int64)
    total = tl.maximum(behind, 1)
    programs = tl.minimum(tl.num_programs(0), total)  # no piece is empty; programs behind them have none
    at = (total * i // programs).to(tl.int32)
    end = tl.minimum(total * (i + 1) // programs, behind).to(tl.int32)
    query, g, begin, of_head, count, table, lowest, parts = _piece_at(
        at, ends, total, programs, positions, sequence, table_stride, num_queries, KV_HEADS
    )
    wait(OVERLAP)

    while at < end:
        first, stop = at - begin, tl.minimum(end - begin, of_head)
        heads = q + query.to(tl.int64) * q_stride + g * REPEAT * D
        if WORDS:
            to = g * (D // 2)
            acc, weight, reference = _attend_piece_of_words(
                heads, k + to, v + to, block_table + table, count, first, stop, k_stride, v_stride, scale,
                REPEAT, D, BLOCK_D, BLOCK_H, BLOCK_N, PAGE, STAGES, NATIVE,
            )  # fmt: skip
        else:
            acc, weight, reference = _attend_piece(
                heads, k + g * D, v + g * D, block_table + table, count, first, stop, k_stride, v_stride, scale,
                REPEAT, D, BLOCK_D, BLOCK_H, BLOCK_N, PAGE, STAGES,
            )  # fmt: skip
        acc = acc / tl.where(weight == 0.0, 1.0, weight)[:, None]
        heads_out = out + (query * H + g * REPEAT) * D
        if parts == 1:
            tl.store(heads_out + h[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
        else:
            # A head that begins with program `lowest` leaves results from 2 * lowest on: its last program is a later
            # one, and no other head that has several begins before that one.
            part = lowest + i + 2 * tl.num_programs(0) * h
            tl.store(partial + part[:, None] * D + d[None, :], acc, mask=mask)
            tl.store(sums + part, reference + tl.log2(weight), mask=h < REPEAT)
            tl.debug_barrier()  # all of this program's stores come before its arrival
            if tl.atomic_add(arrived + lowest, 1, sem="acq_rel") == parts - 1:
                row = 2 * tl.num_programs(0)
                merge_splits(
                    partial + 2 * lowest * D, sums + 2 * lowest, heads_out, parts, row, REPEAT, D, BLOCK_D, MERGED
                )
                tl.store(arrived + lowest, 0)
        at = begin + stop
        if at < end:  # the look-up is a trip to memory, and most programs have one piece
            query, g, begin, of_head, count, table, lowest, parts = _piece_at(
                at, ends, total, programs, positions, sequence, table_stride, num_queries, KV_HEADS
            )

    if unseeing > 0:
        for unseen in range(i, num_queries, tl.num_programs(0)):
            if tl.load(positions + unseen) < 0:
                for head in range(0, H, REPEAT):
                    zeros = out + (unseen * H + head + h[:, None]) * D + d[None, :]
                    tl.store(zeros, tl.zeros([BLOCK_H, BLOCK_D], out.dtype.element_ty), mask=mask)
