"""Decode attention over rows of a memory: one kernel, three ways to say which rows.

Program (query t and KV head, split) attends the query heads of its KV head to its share of the keys. The heads are one
tile of at least 16 rows for the tensor cores. (Several KV heads a program, whose rows of memory lie side by side, were
slower: docs/log.md, 2026-11-28.)
With more than one split each program leaves its result and the base-2 logarithm of its softmax sum, and the last to
arrive of those of a query and heads merges them: there is no second launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clsa_cuda.kernels.float8 import widened
from clsa_cuda.kernels.fused import sine_and_cosine
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.merge import merge_splits
from clsa_cuda.kernels.overlap import wait


@triton.jit
def share(num_blocks, split, splits):
    """First and end of a split's blocks: as many as any other's, or one less. Nothing for split number `splits`."""
    return split * num_blocks // splits, tl.minimum((split + 1) * num_blocks // splits, num_blocks)


@triton.jit
def rows_of_block(
    start,
    count,
    base,
    rows,
    position,
    BLOCK_N: tl.constexpr,
    SOURCE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Physical rows of the keys of a block from `start`, and which of them are there.

    `rows` and `base` are what SOURCE needs: "list": the query's SIZE row numbers; "block": its first row;
    "ring": first of the SIZE rows, keys end before `position`.
    """
    i = start + tl.arange(0, BLOCK_N)
    seen = i < count
    if SOURCE == "list":
        row = tl.load(rows + i, mask=seen, other=-1).to(tl.int64)
        seen = row >= 0
    elif SOURCE == "block":
        row = base + i
    else:
        row = base + (position - count + i) % SIZE
    return row, seen


@triton.jit
def _normed_and_turned(heads, mask, w_x, w_y, sine, cosine, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """QK norm and rotary positions of a tile of heads, one pointer each [BLOCK_H, 1] -> [BLOCK_H, BLOCK_D].

    Norm weights, sines and cosines [1, BLOCK_D]; w_y is that of a dimension's partner.
    """
    d = tl.arange(0, BLOCK_D)
    partner = (d + D // 2) % D  # what d is turned with
    x = tl.load(heads + d[None, :], mask=mask, other=0.0)
    y = tl.load(heads + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / D + eps)[:, None]
    # Rounded between norm and rotation, as the two plain ops do.
    wide = (wide * scale * w_x).to(x.dtype).to(tl.float32)
    y = (y * scale * w_y).to(x.dtype).to(tl.float32)
    return (wide * cosine + y * sine).to(x.dtype)


@triton.jit
def _norm_weights(norm, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of each dimension and of its partner, [1, BLOCK_D] float32 each."""
    d = tl.arange(0, BLOCK_D)
    w_x = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
    w_y = tl.load(norm + (d + D // 2) % D, mask=d < D, other=0.0).to(tl.float32)
    return w_x[None, :], w_y[None, :]


@triton.jit
def _turn(frequencies, position, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sines, with the sign that the partner takes, and cosines of a position: [1, BLOCK_D] float32 each."""
    d = tl.arange(0, BLOCK_D)
    angle = position.to(tl.float32) * tl.load(frequencies + d % (D // 2), mask=d < D, other=0.0)
    sine, cosine = sine_and_cosine(angle)
    return tl.where(d < D // 2, -sine, sine)[None, :], cosine[None, :]


@triton.jit
def attend_to(q_tile, k_tile, v_tile, visible, scale, acc, total, highest):
    """One block of keys [BLOCK_N, BLOCK_D] in the running softmax of a tile of heads."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # -inf - -inf is NaN
    weights = tl.exp2(scores - reference[:, None])
    keep = tl.exp2(highest - reference)
    total = total * keep + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * keep[:, None], input_precision="ieee")
    return acc, total, new_highest


@launcher
@triton.jit(do_not_specialize=["splits"])
def _attend_kernel(
    q,  # [T, H, D]
    k,  # [N, G, D]
    v,  # [N, G, D]
    own_k,  # [T, G, D], "ring" only: the query's own token, which is not in the ring yet
    own_v,  # [T, G, D]
    q_norm,  # [D], WINDOW only
    k_norm,  # [D], WINDOW only
    frequencies,  # [D / 2] float32, WINDOW only
    mapping,  # [T] row of the ring that the token is written to or -1, WINDOW only
    rows,  # "list": [T, K] rows; "ring": [T] slots; "block": not read
    lengths,  # "block", "list": [T] keys; "ring": [T] positions. Rows of a "list" may end earlier, at -1
    out,  # [T, H, D]
    partial,  # [T, H, splits, D] float32 scratch
    sums,  # [T, H, splits] float32 scratch
    arrived,  # [T * G] int32, zeros before and after
    H,
    q_stride,
    k_stride,
    v_stride,
    own_k_stride,
    own_v_stride,
    rows_stride,
    scale,  # log2(e) / sqrt(D)
    eps,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REPEAT: tl.constexpr,  # query heads of a KV head
    KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,  # whether there is more than one split
    SOURCE: tl.constexpr,
    SIZE: tl.constexpr,  # "list": K; "ring": W; "block": rows of a query
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,  # "ring" only: q and own_k are projections; norm, turn, and write the token to the ring
    FRESH: tl.constexpr,  # whether more than q and the own tokens may have been made by the kernel in front
    LAST: tl.constexpr,
    MERGED: tl.constexpr,  # splits whose results are read at once
    OVERLAP: tl.constexpr,
):
    """Program (t * KV_HEADS + g, split): see above."""
    if FRESH:
        wait(OVERLAP)
    t = tl.program_id(0).to(tl.int64) // KV_HEADS
    g = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)

    base = t * SIZE
    position = 0
    if SOURCE == "list":
        count = SIZE
        rows += t * rows_stride
    else:
        position = tl.load(lengths + t)
        count = position
        if SOURCE == "ring":
            count = tl.minimum(tl.maximum(position, 0), SIZE - 1)
            base = tl.load(rows + t).to(tl.int64) * SIZE
    num_blocks = tl.cdiv(count, BLOCK_N)
    # The query's own token is turned as the query is, which takes as long as some blocks of keys: the last program's.
    first, stop = share(num_blocks, split, splits - 1 if SOURCE == "ring" and SPLIT else splits)
    place = g * D + d[None, :]
    d_mask = (d < D)[None, :]
    # The first keys, while the kernel in front still makes the queries. An empty split asks for keys that are there.
    start = tl.minimum(first, tl.maximum(num_blocks - 1, 0)) * BLOCK_N
    row, seen = rows_of_block(start, count, base, rows, position, BLOCK_N, SOURCE, SIZE)
    seen_first = seen & (first < stop)
    k_first = tl.load(k + row[:, None] * k_stride + place, mask=seen_first[:, None] & d_mask, other=0.0)
    v_first = tl.load(v + row[:, None] * v_stride + place, mask=seen_first[:, None] & d_mask, other=0.0)
    if SOURCE == "list":  # not before: the first keys need not wait for it
        stop = tl.minimum(stop, tl.cdiv(tl.load(lengths + t), BLOCK_N))
    q_weights, q_partners, k_weights, k_partners, sine, cosine = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if WINDOW:
        q_weights, q_partners = _norm_weights(q_norm, D, BLOCK_D)
        k_weights, k_partners = _norm_weights(k_norm, D, BLOCK_D)
        sine, cosine = _turn(frequencies, position, D, BLOCK_D)
    if not FRESH:
        wait(OVERLAP)

    first_head = t * H + g * REPEAT
    head = first_head + h
    q_mask = (h < REPEAT)[:, None] & d_mask
    heads = q + t * q_stride + (g * REPEAT + h)[:, None] * D
    if WINDOW:
        q_tile = _normed_and_turned(heads, q_mask, q_weights, q_partners, sine, cosine, eps, D, BLOCK_D)
    else:
        q_tile = tl.load(heads + d[None, :], mask=q_mask, other=0.0)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    if SOURCE == "ring":  # noqa: SIM102 (this is decided when compiling, the next when running)
        if (split == tl.num_programs(1) - 1) & (position >= 0):
            own_place = place + tl.zeros([BLOCK_H, 1], tl.int32)
            mine_v = tl.load(own_v + t * own_v_stride + own_place, mask=q_mask, other=0.0)
            if WINDOW:
                heads = own_k + t * own_k_stride + g * D + tl.zeros([BLOCK_H, 1], tl.int32)
                mine_k = _normed_and_turned(heads, q_mask, k_weights, k_partners, sine, cosine, eps, D, BLOCK_D)
                to = tl.load(mapping + t).to(tl.int64)
                # Nobody reads this row now: it held position p - W, or nothing.
                once = q_mask & (h == 0)[:, None] & (to >= 0)
                tl.store(k + to * k_stride + own_place, mine_k, mask=once)
                tl.store(v + to * v_stride + own_place, mine_v, mask=once)
            else:
                mine_k = tl.load(own_k + t * own_k_stride + own_place, mask=q_mask, other=0.0)
            highest = tl.sum(q_tile.to(tl.float32) * mine_k.to(tl.float32), axis=1) * scale
            total = tl.full([BLOCK_H], 1.0, tl.float32)
            acc += mine_v.to(tl.float32)

    if not LAST:
        k_first, v_first = widened(k_first, q_tile), widened(v_first, q_tile)
        acc, total, highest = attend_to(q_tile, k_first, v_first, seen_first[None, :], scale, acc, total, highest)
    for block in tl.range(first + 1, stop, num_stages=STAGES):
        row, seen = rows_of_block(block * BLOCK_N, count, base, rows, position, BLOCK_N, SOURCE, SIZE)
        mask = seen[:, None]
        if BLOCK_D != D:
            mask = mask & d_mask
        k_tile = widened(tl.load(k + row[:, None] * k_stride + place, mask=mask, other=0.0), q_tile)
        v_tile = widened(tl.load(v + row[:, None] * v_stride + place, mask=mask, other=0.0), q_tile)
        acc, total, highest = attend_to(q_tile, k_tile, v_tile, seen[None, :], scale, acc, total, highest)
    if LAST:
        k_first, v_first = widened(k_first, q_tile), widened(v_first, q_tile)
        acc, total, highest = attend_to(q_tile, k_first, v_first, seen_first[None, :], scale, acc, total, highest)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if not SPLIT:
        tl.store(out + head[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=q_mask)
    else:
        tl.store(partial + (head * splits + split)[:, None] * D + d[None, :], acc, mask=q_mask)
        tl.store(sums + head * splits + split, highest + tl.log2(total), mask=h < REPEAT)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
            at = first_head * splits
            merge_splits(partial + at * D, sums + at, out + first_head * D, splits, splits, REPEAT, D, BLOCK_D, MERGED)
            tl.store(arrived + tl.program_id(0), 0)
