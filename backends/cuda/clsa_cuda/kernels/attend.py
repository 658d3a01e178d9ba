"""Decode attention over rows of a memory: one kernel, four ways to say which rows.

Program (query t, KV head g, split) attends the query heads of the group, packed into one tile of at least 16 rows for
the tensor cores, to its share of the keys. With more than one split each program leaves its result and the base-2
logarithm of its softmax sum, and the last to arrive of those of (t, g) merges them: there is no second launch.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.errors import BackendError
from clsa_cuda.kernels.tiles import AttentionTiles, next_power_of_2

_MAX_PAIRS = 1 << 16  # (query, KV head) pairs of one launch with splits; far fewer fill any GPU without


@triton.jit
def _merge(
    partial,
    sums,
    out,
    t,
    g,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REPEAT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Write the heads of group g from the results of all splits: each weighs what its softmax sum is of the whole."""
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    for r in tl.static_range(REPEAT):
        head = t * H + g * REPEAT + r
        # .cg: from L2, where the other programs' stores are.
        share = tl.load(sums + head * SPLITS + split, cache_modifier=".cg")
        highest = tl.max(share)
        share = tl.exp2(share - tl.where(highest == float("-inf"), 0.0, highest))
        whole = tl.sum(share)
        share = share / tl.where(whole == 0.0, 1.0, whole)
        where = (head * SPLITS + split)[:, None] * D + d[None, :]
        parts = tl.load(partial + where, mask=(d < D)[None, :], other=0.0, cache_modifier=".cg")
        merged = tl.sum(parts * share[:, None], axis=0)
        tl.store(out + head * D + d, merged.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _rows_of_block(start, count, base, rows, position, BLOCK_N: tl.constexpr, SOURCE: tl.constexpr, SIZE: tl.constexpr):
    """Physical rows of keys start to start + BLOCK_N, and which of them are there.

    `rows` and `base` are what SOURCE needs: "list": the query's row numbers; "block": its first row;
    "pages": its row of the page table, pages of SIZE; "ring": first of the SIZE rows, keys end before `position`.
    """
    i = start + tl.arange(0, BLOCK_N)
    seen = i < count
    if SOURCE == "list":
        row = tl.load(rows + i, mask=seen, other=-1).to(tl.int64)
        seen = row >= 0
    elif SOURCE == "block":
        row = base + i
    elif SOURCE == "pages":
        if BLOCK_N <= SIZE:
            page = tl.load(rows + start // SIZE).to(tl.int64)
            row = page * SIZE + start % SIZE + tl.arange(0, BLOCK_N)
        else:
            page = tl.load(rows + i // SIZE, mask=seen, other=0).to(tl.int64)
            row = page * SIZE + i % SIZE
    else:
        row = base + (position - count + i) % SIZE
    return row, seen


@triton.jit
def _attend_kernel(
    q,  # [T, H, D]
    k,  # [N, G, D]
    v,  # [N, G, D]
    own_k,  # [T, G, D], "ring" only: the query's own token, which is not in the ring yet
    own_v,  # [T, G, D]
    rows,  # "list": [T, K] rows; "pages": [B, M] page table; "ring": [B] slots; "block": not read
    lengths,  # "list", "block": [T] keys; "pages", "ring": [T] positions
    sequence,  # [T], "pages" and "ring" only
    out,  # [T, H, D]
    partial,  # [T, H, SPLITS, D] float32 scratch
    sums,  # [T, H, SPLITS] float32 scratch
    arrived,  # [T * G] int32, zeros before and after
    H,
    q_stride,
    k_stride,
    v_stride,
    own_k_stride,
    own_v_stride,
    rows_stride,
    scale,  # log2(e) / sqrt(D)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REPEAT: tl.constexpr,  # query heads of a group
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    SOURCE: tl.constexpr,
    SIZE: tl.constexpr,  # "pages": tokens of a page; "ring": W; "block": rows of a query
    STAGES: tl.constexpr,
):
    """Program (t, g, split): see above."""
    t = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    split = tl.program_id(2)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    head = t * H + g * REPEAT + h
    q_mask = (h < REPEAT)[:, None] & (d < D)[None, :]
    q_tile = tl.load(q + t * q_stride + (g * REPEAT + h)[:, None] * D + d[None, :], mask=q_mask, other=0.0)

    length = tl.load(lengths + t)
    position = length
    base = t * SIZE
    count = length
    if SOURCE == "pages":
        count = length + 1
        rows += tl.load(sequence + t).to(tl.int64) * rows_stride
    elif SOURCE == "ring":
        count = tl.minimum(tl.maximum(length, 0), SIZE - 1)
        base = tl.load(rows + tl.load(sequence + t)).to(tl.int64) * SIZE
    elif SOURCE == "list":
        rows += t * rows_stride

    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    if SOURCE == "ring":  # noqa: SIM102 (this is decided when compiling, the next when running)
        if (split == 0) & (position >= 0):
            mine_k = tl.load(own_k + t * own_k_stride + g * D + d, mask=d < D, other=0.0)
            mine_v = tl.load(own_v + t * own_v_stride + g * D + d, mask=d < D, other=0.0)
            highest = tl.sum(q_tile.to(tl.float32) * mine_k.to(tl.float32)[None, :], axis=1) * scale
            total = tl.full([BLOCK_H], 1.0, tl.float32)
            acc += mine_v.to(tl.float32)[None, :]

    num_blocks = tl.cdiv(count, BLOCK_N)
    per_split = tl.cdiv(num_blocks, SPLITS)
    first = split * per_split
    stop = tl.minimum(first + per_split, num_blocks)
    k += g * D
    v += g * D
    for block in tl.range(first, stop, num_stages=STAGES):
        row, seen = _rows_of_block(block * BLOCK_N, count, base, rows, position, BLOCK_N, SOURCE, SIZE)
        mask = seen[:, None]
        if BLOCK_D != D:
            mask = mask & (d < D)[None, :]
        k_tile = tl.load(k + row[:, None] * k_stride + d[None, :], mask=mask, other=0.0)
        v_tile = tl.load(v + row[:, None] * v_stride + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # -inf - -inf is NaN
        weights = tl.exp2(scores - reference[:, None])
        keep = tl.exp2(highest - reference)
        total = total * keep + tl.sum(weights, axis=1)
        acc = acc * keep[:, None]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        highest = new_highest

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLITS == 1:
        tl.store(out + head[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=q_mask)
    else:
        tl.store(partial + (head * SPLITS + split)[:, None] * D + d[None, :], acc, mask=q_mask)
        tl.store(sums + head * SPLITS + split, highest + tl.log2(total), mask=h < REPEAT)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        pair = t * (H // REPEAT) + g
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == SPLITS - 1:
            _merge(partial, sums, out, t, g, H, D, BLOCK_D, REPEAT, SPLITS)
            tl.store(arrived + pair, 0)


@functools.cache
def _arrival_counters(device: torch.device) -> Tensor:
    """Zeros that every launch leaves as zeros. Launches that share them must not overlap: one stream a device."""
    return torch.zeros(_MAX_PAIRS, dtype=torch.int32, device=device)


def attend_rows(
    source: str,
    size: int,
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None,
    rows: Tensor,
    lengths: Tensor,
    sequence: Tensor | None,
    tiles: AttentionTiles,
) -> Tensor:
    """Launch the kernel: see its arguments. q [T, H, D], kv [N, G, D] each, own [T, G, D] each -> [T, H, D]."""
    num_queries, num_heads, head_dim = q.shape
    kv_heads = kv[0].shape[1]
    out = torch.empty(num_queries, num_heads, head_dim, dtype=q.dtype, device=q.device)
    if num_queries == 0:
        return out
    own = own or kv
    for name, x in (("k", kv[0]), ("v", kv[1]), ("the token's own k", own[0]), ("the token's own v", own[1])):
        if x.dtype != q.dtype:
            raise BackendError(f"decode attention needs q and {name} in one dtype, got {q.dtype} and {x.dtype}")
    assert all(x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == head_dim) for x in (q, *kv, *own))
    assert rows.stride(-1) == 1 and lengths.is_contiguous()
    assert tiles.splits == 1 or num_queries * kv_heads <= _MAX_PAIRS
    scratch = (num_queries, num_heads, tiles.splits if tiles.splits > 1 else 0)
    partial = torch.empty(*scratch, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(scratch, dtype=torch.float32, device=q.device)
    repeat = num_heads // kv_heads
    _attend_kernel[num_queries, kv_heads, tiles.splits](
        q,
        *kv,
        *own,
        rows,
        lengths,
        lengths if sequence is None else sequence,
        out,
        partial,
        sums,
        _arrival_counters(q.device),
        num_heads,
        q.stride(0),
        kv[0].stride(0),
        kv[1].stride(0),
        own[0].stride(0),
        own[1].stride(0),
        rows.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        D=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        REPEAT=repeat,
        BLOCK_H=max(16, next_power_of_2(repeat)),
        BLOCK_N=tiles.block_n,
        SPLITS=tiles.splits,
        SOURCE=source,
        SIZE=size,
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )
    return out
