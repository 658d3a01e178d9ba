"""Products of few rows on Hopper: a ring of weights in shared memory fills before the kernel in front has ended.

`product` can ask for one tile of weights before it waits for its rows of x: Triton lays its whole pipeline behind the
wait. Gluon, Triton's lower level, lets us say more: all of the ring is on its way while the kernel in front finishes, x
follows through a ring of its own after the wait, and the tensor cores read both where they lie. So the memory is never
idle for long between two products (docs/log.md, 2026-11-28). What is computed, and how K is split, is as in `product`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from clsa.ops import Float8Weight, Weight
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters
from clsa_cuda.kernels.ring_tiles import BLOCK_N, RingTiles, aligned, block_of_rows
from clsa_cuda.kernels.tiles import Limits, launch_options

_WARPS = 4  # one warp group
# Names that Triton changed between 3.6 and 3.9.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
copy_in = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _wait(OVERLAP: gl.constexpr):
    """As `overlap.wait`."""
    if OVERLAP:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def _ask_for_weights(rings, at, n_live, block, slot, BLOCK_K: gl.constexpr, NORM: gl.constexpr, SWIGLU: gl.constexpr):
    """One tile of weights, and of the norm's, into a slot. Rows that are not live become zeros."""
    w_ring, up_ring, norm_ring = rings
    w_at, up_at, norm_at = at
    copy_in(w_ring.index(slot), w_at + block * BLOCK_K, mask=n_live[:, None])
    if SWIGLU:
        copy_in(up_ring.index(slot), up_at + block * BLOCK_K, mask=n_live[:, None])
    if NORM:
        copy_in(norm_ring.index(slot), norm_at + block * BLOCK_K)


@gluon.jit
def _finished(turn, up_turn, w_ring, up_ring, factors, SWIGLU: gl.constexpr):
    """The sums, when the tensor cores are done with them and with what they read.

    What they read is named, or the compiler takes it for unused behind the last product and puts other things there.
    """
    if SWIGLU:
        turn, up_turn, _, _, _ = warpgroup_mma_wait(0, deps=(turn, up_turn, w_ring, up_ring, factors))
    else:
        turn, _, _ = warpgroup_mma_wait(0, deps=(turn, w_ring, factors))
    return turn, up_turn


@gluon.jit
def _in_two(x, pair):
    """Float32 rows [M, K] as two rows of E4M3 each, `pair` [2 M, K]: x = (high + low / 16) * the power [M] returned.

    Eight bits are four and four, so this is exact for bfloat16 numbers down to 2^-15 of the largest of a row, and what
    is lost below is 2^-23 of it at most. A row with infinity in it gets NaN as its power.
    """
    M: gl.constexpr = x.shape[0]
    largest = gl.max(gl.abs(x), axis=1)
    exponent = gl.maximum(largest.to(gl.int32, bitcast=True) & 0x7F800000, 16 << 23) - (7 << 23)
    power = exponent.to(gl.float32, bitcast=True)
    x = x * ((254 << 23) - exponent).to(gl.float32, bitcast=True)[:, None]  # the largest becomes 128 to 256
    high = x.to(gl.float8e4nv)
    pair.slice(0, M).store(high)
    pair.slice(M, M).store(((x - high.to(gl.float32)) * 16.0).to(gl.float8e4nv))
    return power + (largest - largest)


@gluon.jit
def _folded(acc, turn, power, mma: gl.constexpr):
    """acc [N, M] + the products [N, 2 M] of one block with `_in_two` rows."""
    N: gl.constexpr = acc.shape[0]
    M: gl.constexpr = acc.shape[1]
    high, low = gl.split(gl.permute(gl.reshape(turn, [N, 2, M]), (0, 2, 1)))
    # Nothing moves: a thread has the same places in both layouts.
    high = gl.convert_layout(high, mma, assert_trivial=True)
    low = gl.convert_layout(low, mma, assert_trivial=True)
    return acc + (high + low * 0.0625) * power[None, :]


@gluon.jit
def _finite(scales):
    """As `float8.finite`."""
    return scales + (scales - scales)


@gluon.jit
def _merged(
    acc, squares, mine, split, inside, r, SPLITS: gl.constexpr, SIZE: gl.constexpr, NORM: gl.constexpr, arrived
):
    """The program that arrives last at a tile has the sums of all parts, in their order; (acc, squares, whether)."""
    WIDTH: gl.constexpr = SIZE + squares.shape[0]  # of a part: sums, and the squares behind them
    gl.store(mine + split * WIDTH + inside, acc)
    if NORM:
        gl.store(mine + split * WIDTH + SIZE + r, squares)
    barrier()  # all of this program's stores come before its arrival
    last = gl.atomic_add(arrived, 1, sem="acq_rel") == SPLITS - 1
    if last:
        acc = gl.zeros_like(acc)
        squares = gl.zeros_like(squares)
        for s in gl.static_range(SPLITS):  # .cg: from L2, where the other programs' stores are
            acc += gl.load(mine + s * WIDTH + inside, cache_modifier=".cg")
            if NORM:
                squares += gl.load(mine + s * WIDTH + SIZE + r, cache_modifier=".cg")
        gl.store(arrived, 0)
    return acc, squares, last


@launcher
@gluon.jit(do_not_specialize=["M"])
def _ring_kernel(
    x,  # [M, K], rows x_stride apart
    w,  # [N, K], with SWIGLU [2 N, K]: all rows of gate, then all rows of up
    scales,  # [N] or [2 N] float32, SCALED only: of rows of E4M3
    norm,  # [K], NORM only
    residual,  # [M, N], rows residual_stride apart, ADD only
    out,  # [M, N]
    partial,  # float32 scratch: see RingTiles.scratch
    arrived,  # [N / ROWS] int32, zeros before and after
    M,
    N,
    x_stride,
    residual_stride,
    eps,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    SCALED: gl.constexpr,
    NORM: gl.constexpr,
    SWIGLU: gl.constexpr,
    ADD: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Program tile * SPLITS + split: ROWS outputs of all rows of x, over a part of K. K in whole blocks."""
    tile = gl.program_id(0) // SPLITS
    split = gl.program_id(0) % SPLITS
    WARPS: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 16]
    )
    COLUMNS: gl.constexpr = 2 * BLOCK_M if SCALED else BLOCK_M  # of a turn: see `_in_two`
    turns: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 32 if SCALED else 16]
    )
    element: gl.constexpr = x.dtype.element_ty
    # 16 bytes a thread.
    along: gl.constexpr = min(32, BLOCK_K // 8)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [32 // along, along], [WARPS, 1], [1, 0])
    w_each: gl.constexpr = 16 if SCALED else 8
    w_along: gl.constexpr = min(32, BLOCK_K // w_each)
    w_copies: gl.constexpr = gl.BlockedLayout([1, w_each], [32 // w_along, w_along], [WARPS, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    operand: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    w_operand: gl.constexpr = gl.NVMMASharedLayout(128, 8 if SCALED else 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_ring = gl.allocate_shared_memory(w.dtype.element_ty, [STAGES, BLOCK_N, BLOCK_K], w_operand)
    x_ring = gl.allocate_shared_memory(element, [STAGES, BLOCK_M, BLOCK_K], operand)
    up_ring = w_ring
    if SWIGLU:
        up_ring = gl.allocate_shared_memory(w.dtype.element_ty, [STAGES, BLOCK_N, BLOCK_K], w_operand)
    norm_ring = x_ring
    if NORM:
        norm_ring = gl.allocate_shared_memory(element, [STAGES, BLOCK_K], flat)
    rings = (w_ring, up_ring, norm_ring)
    factors = x_ring  # what weights are multiplied with
    if SCALED:
        factors = gl.allocate_shared_memory(w.dtype.element_ty, [2 * BLOCK_M, BLOCK_K], w_operand)

    i = gl.arange(0, BLOCK_N, gl.SliceLayout(1, w_copies))
    n = tile * ROWS + i
    n_live = (i < ROWS) & (n < N)
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, copies))
    m_live = m < M
    BLOCKS: gl.constexpr = K // BLOCK_K
    PER_SPLIT: gl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    first = split * PER_SPLIT
    count = gl.minimum(PER_SPLIT, BLOCKS - first)
    w_k = first * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, w_copies))
    w_at = w + gl.where(n_live, n, 0).to(gl.int64)[:, None] * K + w_k[None, :]
    x_k = first * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, copies))
    x_at = x + gl.where(m_live, m, 0).to(gl.int64)[:, None] * x_stride + x_k[None, :]
    at = (w_at, w_at + gl.cast(N, gl.int64) * K, norm + first * BLOCK_K + gl.arange(0, BLOCK_K, line))

    # Copies are told apart by the group they were committed in; each turn of the loop adds one group, with or without
    # copies, and needs all but the newest STAGES - 2.
    for stage in gl.static_range(STAGES):
        if stage < count:
            _ask_for_weights(rings, at, n_live, stage, stage, BLOCK_K, NORM, SWIGLU)
        async_copy.commit_group()
    _wait(OVERLAP)
    for stage in gl.static_range(STAGES):
        if stage < count:
            copy_in(x_ring.index(stage), x_at + stage * BLOCK_K, mask=m_live[:, None])
        async_copy.commit_group()
    j = gl.arange(0, BLOCK_N, gl.SliceLayout(1, mma))
    r = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    n_out = tile * ROWS + j
    n_out_live = (j < ROWS) & (n_out < N)
    live = n_out_live[:, None] & (r < M)[None, :]
    rows = r.to(gl.int64)[None, :]
    zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, mma)
    added = zeros
    if ADD:  # asked for now, as whatever comes last is waited for
        added = gl.load(residual + rows * residual_stride + n_out[:, None], mask=live, other=0.0).to(gl.float32)

    acc = zeros
    up_acc = zeros
    turn = warpgroup_mma_init(gl.zeros([BLOCK_N, COLUMNS], gl.float32, turns))
    up_turn = warpgroup_mma_init(gl.zeros([BLOCK_N, COLUMNS], gl.float32, turns))
    power = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(0, mma))
    square = gl.zeros([BLOCK_M, BLOCK_K], gl.float32, copies)
    slot = 0
    before = STAGES - 1
    for block in range(count):
        turn, up_turn = _finished(turn, up_turn, w_ring, up_ring, factors, SWIGLU)
        if SCALED:
            acc = _folded(acc, turn, power, mma)
            if SWIGLU:
                up_acc = _folded(up_acc, up_turn, power, mma)
        async_copy.wait_group(STAGES - 2)
        barrier()  # all threads' copies are there, and nobody reads the slot of before any more
        factor = x_ring.index(slot)
        if NORM or SCALED:
            wide = factor.load(copies).to(gl.float32)
            if NORM:
                square += wide * wide
                weights = norm_ring.index(slot).load(gl.SliceLayout(0, copies)).to(gl.float32)
                wide = (wide * weights[None, :]).to(element).to(gl.float32)
            if SCALED:
                power = gl.convert_layout(_in_two(wide, factors), gl.SliceLayout(0, mma))
                factor = factors
            else:
                factor.store(wide.to(element))
        fence_async_shared()
        factor = factor.permute((1, 0))
        turn = warpgroup_mma(w_ring.index(slot), factor, turn, use_acc=not SCALED, is_async=True)
        if SWIGLU:
            up_turn = warpgroup_mma(up_ring.index(slot), factor, up_turn, use_acc=not SCALED, is_async=True)
        again = block + STAGES - 1
        if (block > 0) & (again < count):
            _ask_for_weights(rings, at, n_live, again, before, BLOCK_K, NORM, SWIGLU)
            copy_in(x_ring.index(before), x_at + again * BLOCK_K, mask=m_live[:, None])
        async_copy.commit_group()
        before = slot
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    squares = gl.convert_layout(gl.sum(square, axis=1), gl.SliceLayout(0, mma))
    turn, up_turn = _finished(turn, up_turn, w_ring, up_ring, factors, SWIGLU)
    if SCALED:
        acc = _folded(acc, turn, power, mma)
        if SWIGLU:
            up_acc = _folded(up_acc, up_turn, power, mma)
    else:
        acc = turn
        if SWIGLU:
            up_acc = up_turn

    last = True
    if SPLITS > 1:
        SIZE: gl.constexpr = BLOCK_N * BLOCK_M
        part = partial + tile.to(gl.int64) * (SPLITS * (SIZE + BLOCK_M))
        inside = j[:, None] * BLOCK_M + r[None, :]
        acc, squares, last = _merged(acc, squares, part, split, inside, r, SPLITS, SIZE, NORM, arrived + tile)
    if last:
        if SCALED:
            acc = acc * _finite(gl.load(scales + n_out, mask=n_out_live, other=0.0))[:, None]
            if SWIGLU:
                up_acc = up_acc * _finite(gl.load(scales + N + n_out, mask=n_out_live, other=0.0))[:, None]
        if NORM:
            scale = 1.0 / gl.sqrt(squares / K + eps)
            acc = acc * scale[None, :]
            if SWIGLU:
                up_acc = up_acc * scale[None, :]
        if SWIGLU:
            acc = acc / (1.0 + gl.exp(-acc)) * up_acc
        if ADD:
            acc += added
        gl.store(out + rows * N + n_out[:, None], acc.to(out.dtype.element_ty), mask=live)


def ring_product(
    x: Tensor,
    weight: Weight,
    norm: Tensor | None,
    eps: float,
    swiglu: bool,
    residual: Tensor | None,
    dtype: torch.dtype,
    tiles: RingTiles,
    device: Limits,
) -> Tensor:
    """`linear.product` of weights [N, K] in 16 or 8 bits, K in whole blocks of `tiles`."""
    scaled = isinstance(weight, Float8Weight)
    w, scales = (weight.values, weight.scales) if isinstance(weight, Float8Weight) else (weight, x)
    num_rows, in_size = x.shape
    out_size = w.shape[0] // 2 if swiglu else w.shape[0]
    assert in_size % tiles.block_k == 0 and (tiles.splits == 1 or not swiglu)
    # Triton 3.6 fails to compile the stages of a ring that is known to be never full.
    assert tiles.num_stages >= 3 and (tiles.splits > 1 or tiles.num_stages * tiles.block_k <= in_size)
    if not aligned(x) or x.stride(0) % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    out = torch.empty(num_rows, out_size, dtype=dtype, device=x.device)
    units, block_m = tiles.units(out_size), block_of_rows(num_rows)
    assert units <= MAX_ARRIVALS
    _ring_kernel[units,](
        x,
        w,
        scales,
        x if norm is None else norm,
        out if residual is None else residual,
        out,
        torch.empty(tiles.scratch(out_size, block_m), dtype=torch.float32, device=x.device),
        arrival_counters(x.device),
        num_rows,
        out_size,
        x.stride(0),
        out_size if residual is None else residual.stride(0),
        eps,
        K=in_size,
        BLOCK_M=block_m,
        ROWS=tiles.rows,
        BLOCK_N=BLOCK_N,
        BLOCK_K=tiles.block_k,
        SPLITS=tiles.splits,
        STAGES=tiles.num_stages,
        SCALED=scaled,
        NORM=norm is not None,
        SWIGLU=swiglu,
        ADD=residual is not None,
        OVERLAP=device.early_launch,
        num_warps=_WARPS,
        **launch_options(device),
    )
    return out
