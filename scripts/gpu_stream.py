"""An experiment: products of few rows whose weights are on their way before the kernel in front has ended.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_stream.py --out result.json [--rows 1,8,32]

`clsa_cuda.kernels.product` reads one tile of weights before it waits for its input. Here a whole ring of tiles in
shared memory is asked for first (Gluon, Triton's lower level, can say that), so that what comes after the wait is the
input's latency and little else. It is held against float64 products and timed in the chains of `scripts/gpu_layers.py`,
beside `product`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import gpu_layers as layers
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from clsa_cuda.kernels.overlap import arrival_counters
from clsa_cuda.kernels.product import ProductTiles
from clsa_cuda.kernels.tiles import launch_options, limits, next_power_of_2


@gluon.jit
def _fetch(w_ring, up_ring, w, up, block, stage, k, n_offset, live, K, BLOCK_K: gl.constexpr, SWIGLU: gl.constexpr):
    """Ask for one tile of weights. Rows that are not live stay what they are: zeros."""
    place = n_offset[:, None] + (block * BLOCK_K + k)[None, :]
    async_copy.async_copy_global_to_shared(w_ring.index(stage), w + place, mask=live[:, None])
    if SWIGLU:
        async_copy.async_copy_global_to_shared(up_ring.index(stage), up + place, mask=live[:, None])


@gluon.jit
def _stream_kernel(
    x,
    w,
    norm,
    residual,
    out,
    partial,
    arrived,
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
    NORM: gl.constexpr,
    SWIGLU: gl.constexpr,
    ADD: gl.constexpr,
    W_M: gl.constexpr,  # warps along the outputs
    W_N: gl.constexpr,  # warps along the rows of x
):
    """As `_linear_kernel` of clsa_cuda.kernels.linear, K a multiple of SPLITS * BLOCK_K."""
    unit = gl.program_id(0)
    tile = unit // SPLITS
    split = unit % SPLITS
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W_M, W_N], instr_shape=[16, 8])
    of_w: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    of_x: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    along: gl.constexpr = min(32, BLOCK_K // 8)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [32 // along, along], [W_M * W_N, 1], [1, 0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    element: gl.constexpr = w.dtype.element_ty

    w_ring = gl.allocate_shared_memory(element, [STAGES, BLOCK_N, BLOCK_K], shared)
    x_ring = gl.allocate_shared_memory(element, [STAGES, BLOCK_M, BLOCK_K], shared)
    up_ring = w_ring
    if SWIGLU:
        up_ring = gl.allocate_shared_memory(element, [STAGES, BLOCK_N, BLOCK_K], shared)
    for stage in gl.static_range(STAGES):
        w_ring.index(stage).store(gl.zeros([BLOCK_N, BLOCK_K], element, copies))
        x_ring.index(stage).store(gl.zeros([BLOCK_M, BLOCK_K], element, copies))
        if SWIGLU:
            up_ring.index(stage).store(gl.zeros([BLOCK_N, BLOCK_K], element, copies))
    gl.thread_barrier()

    rows: gl.constexpr = gl.SliceLayout(1, copies)
    columns: gl.constexpr = gl.SliceLayout(0, copies)
    i = gl.arange(0, BLOCK_N, rows)
    n = tile * ROWS + i
    live = (i < ROWS) & (n < N)
    n_offset = gl.where(live, n, 0).to(gl.int64) * K
    k = gl.arange(0, BLOCK_K, columns)
    m = gl.arange(0, BLOCK_M, rows)
    m_offset = gl.where(m < M, m, 0).to(gl.int64) * x_stride
    up = w + gl.cast(N, gl.int64) * K
    COUNT: gl.constexpr = K // BLOCK_K // SPLITS
    AHEAD: gl.constexpr = min(STAGES, COUNT)
    first = split * COUNT
    for stage in gl.static_range(AHEAD):
        _fetch(w_ring, up_ring, w, up, first + stage, stage, k, n_offset, live, K, BLOCK_K, SWIGLU)
        async_copy.commit_group()
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    for stage in gl.static_range(AHEAD):
        place = m_offset[:, None] + ((first + stage) * BLOCK_K + k)[None, :]
        async_copy.async_copy_global_to_shared(x_ring.index(stage), x + place, mask=(m < M)[:, None])
        async_copy.commit_group()

    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, mma)
    up_acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, mma)
    square = gl.zeros([BLOCK_K, BLOCK_M], gl.float32, of_x)
    for block in range(COUNT):
        slot = block % STAGES
        async_copy.wait_group(AHEAD - 1)
        x_tile = x_ring.index(slot).permute([1, 0]).load(of_x)
        if NORM:
            wide = x_tile.to(gl.float32)
            square += wide * wide
            at = (first + block) * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(1, of_x))
            x_tile = (wide * gl.load(norm + at).to(gl.float32)[:, None]).to(element)
        acc = mma_v2(w_ring.index(slot).load(of_w), x_tile, acc)
        if SWIGLU:
            up_acc = mma_v2(up_ring.index(slot).load(of_w), x_tile, up_acc)
        if block + AHEAD < COUNT:
            _fetch(w_ring, up_ring, w, up, first + block + AHEAD, slot, k, n_offset, live, K, BLOCK_K, SWIGLU)
            place = m_offset[:, None] + ((first + block + AHEAD) * BLOCK_K + k)[None, :]
            async_copy.async_copy_global_to_shared(x_ring.index(slot), x + place, mask=(m < M)[:, None])
        async_copy.commit_group()

    per_row: gl.constexpr = gl.SliceLayout(0, mma)
    squares = gl.convert_layout(gl.sum(gl.convert_layout(square, copies), axis=0), per_row)
    j = gl.arange(0, BLOCK_N, gl.SliceLayout(1, mma))
    r = gl.arange(0, BLOCK_M, per_row)
    SIZE: gl.constexpr = BLOCK_N * BLOCK_M
    SUMS: gl.constexpr = 2 * SIZE if SWIGLU else SIZE
    WIDTH: gl.constexpr = SUMS + BLOCK_M
    inside = j[:, None] * BLOCK_M + r[None, :]
    last = True
    if SPLITS > 1:
        mine = partial + tile.to(gl.int64) * (SPLITS * WIDTH)
        gl.store(mine + split * WIDTH + inside, acc)
        if SWIGLU:
            gl.store(mine + split * WIDTH + SIZE + inside, up_acc)
        if NORM:
            gl.store(mine + split * WIDTH + SUMS + r, squares)
        gl.thread_barrier()
        last = gl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, mma)
            up_acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, mma)
            squares = gl.zeros([BLOCK_M], gl.float32, per_row)
            for s in gl.static_range(SPLITS):
                acc += gl.load(mine + s * WIDTH + inside, cache_modifier=".cg")
                if SWIGLU:
                    up_acc += gl.load(mine + s * WIDTH + SIZE + inside, cache_modifier=".cg")
                if NORM:
                    squares += gl.load(mine + s * WIDTH + SUMS + r, cache_modifier=".cg")
            gl.store(arrived + tile, 0)
    if last:
        if NORM:
            scale = 1.0 / gl.sqrt(squares / K + eps)
            acc = acc * scale[None, :]
            up_acc = up_acc * scale[None, :]
        if SWIGLU:
            acc = acc / (1.0 + gl.exp(-acc)) * up_acc
        n_out = tile * ROWS + j
        mask = ((j < ROWS) & (n_out < N))[:, None] & (r < M)[None, :]
        if ADD:
            acc += gl.load(
                residual + r.to(gl.int64)[None, :] * residual_stride + n_out[:, None], mask=mask, other=0.0
            ).to(gl.float32)
        gl.store(out + r.to(gl.int64)[None, :] * N + n_out[:, None], acc.to(element), mask=mask)


def stream(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Tensor | None = None,
    tiles: ProductTiles,
) -> Tensor:
    """What `clsa_cuda.kernels.linear.product` computes, of 16-bit weights."""
    num_rows, in_size = x.shape
    out_size = weight.shape[0] // 2 if swiglu else weight.shape[0]
    assert x.stride(1) == 1 and in_size % (tiles.splits * tiles.block_k) == 0
    out = torch.empty(num_rows, out_size, dtype=x.dtype, device=x.device)
    block_m = max(16, next_power_of_2(num_rows))
    warps_m = min(tiles.num_warps, tiles.block_n // 16)
    _stream_kernel[tiles.units(out_size),](
        x,
        weight,
        x if norm is None else norm,
        out if residual is None else residual,
        out,
        torch.empty(tiles.scratch(out_size, block_m, swiglu), dtype=torch.float32, device=x.device),
        arrival_counters(x.device),
        num_rows,
        out_size,
        x.stride(0),
        out_size if residual is None else residual.stride(0),
        eps,
        K=in_size,
        BLOCK_M=block_m,
        ROWS=tiles.rows,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        SPLITS=tiles.splits,
        STAGES=tiles.num_stages,
        NORM=norm is not None,
        SWIGLU=swiglu,
        ADD=residual is not None,
        W_M=warps_m,
        W_N=tiles.num_warps // warps_m,
        num_warps=tiles.num_warps,
        **launch_options(limits(x.device)),
    )
    return out


def choices(rows: int, start: dict[str, Any], shapes: dict[str, tuple[int, int, bool]]) -> dict[str, dict[str, Any]]:
    """Tiles of all four products at once, in so much shared memory a program that two kernels fit, or do not."""
    found = {}
    for room, block_k in ((72, 128), (100, 128), (100, 256), (140, 128), (200, 256)):
        choice = dict(start)
        for name, (_, in_size, swiglu) in shapes.items():
            t = start[name]
            width = 128 if swiglu else block_k
            stage = (t.block_n * (2 if swiglu else 1) + max(16, rows)) * width * 2
            stages = max(2, min(8, (room << 10) // stage, in_size // width // t.splits))
            choice[name] = ProductTiles(t.rows, width, t.splits, stages, t.num_warps)
        found[f"{room} KB, tiles of {block_k}"] = choice
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", default="1,8,32")
    args = parser.parse_args()
    torch.manual_seed(0)
    weights, product = layers.weights(layers.LAYERS), layers.product
    result: list[dict[str, Any]] = []
    for rows in map(int, args.rows.split(",")):
        chain = layers.Chain(rows, weights)
        want = chain.reference()
        row: dict[str, Any] = {"rows": rows, "product_us": chain.microseconds(), "stream_us": {}, "errors": {}}
        layers.product = stream
        for name, choice in choices(rows, layers.defaults(rows), layers.SHAPES).items():
            try:
                chain.choice = choice
                assert (error := chain.wrong(want)) < 1.5e-2, f"wrong by {error}"
                row["stream_us"][name] = chain.microseconds()
            except Exception as error:
                row["errors"][name] = f"{type(error).__name__}: {error}"[:300]
        layers.product = product
        result.append(row)
        print(row, flush=True)
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": result}, file, indent=1)


if __name__ == "__main__":
    main()
