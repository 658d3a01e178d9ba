"""`close_layer` of few rows: output projection, feed-forward, both residuals, in one launch.

The three products need each other's results, so all programs meet between them. They are as many as the GPU has
multiprocessors, all there at once, and each knows what it will multiply next: it asks for those weights before it
waits for the others, so the memory goes on streaming while nobody computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.ops import Float8Weight, Weight
from clsa_cuda.kernels.linear import block_of_rows
from clsa_cuda.kernels.overlap import arrival_counters, meet, meeting_counter, wait
from clsa_cuda.kernels.product import ProductTiles, ask_for_weights, product, product_tiles
from clsa_cuda.kernels.tiles import Limits, launch_options, limits

_COUNTERS = 1 << 13  # arrival counters of each product


@dataclass(frozen=True, slots=True)
class LayerTiles:
    """How the three products are cut, and the programs that share them."""

    output: ProductTiles
    gate: ProductTiles
    down: ProductTiles
    num_programs: int
    num_warps: int


def layer_tiles(num_rows: int, attended: int, hidden: int, inner: int, device: Limits) -> LayerTiles:
    """Tiles of `product_tiles`: each product is one wave of the programs, or nearly."""
    return LayerTiles(
        product_tiles(num_rows, hidden, attended, False, device),
        product_tiles(num_rows, inner, hidden, True, device, block_k=128),
        product_tiles(num_rows, hidden, inner, False, device),
        device.sm_count,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["M", "first_stage", "last_stage"])
def _close_layer_kernel(
    o,  # [M, A]
    x,  # [M, C]
    w_o,  # [C, A]
    w_gate_up,  # [2 F, C]
    w_down,  # [C, F]
    scales_o,
    scales_gate_up,
    scales_down,
    norm,  # [C]
    middle,  # [M, C] the residual stream between attention and feed-forward
    inner,  # [M, F]
    out,  # [M, C]
    partial_o,
    partial_gate,
    partial_down,
    arrived,
    meeting,
    M,
    o_stride,
    x_stride,
    eps,
    first_stage,  # 0 to 2: the first and the last product of this launch
    last_stage,
    A: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    O_ROWS: tl.constexpr,
    O_BLOCK: tl.constexpr,
    O_BLOCK_K: tl.constexpr,
    O_SPLITS: tl.constexpr,
    O_STAGES: tl.constexpr,
    O_PREFETCH: tl.constexpr,
    G_ROWS: tl.constexpr,
    G_BLOCK: tl.constexpr,
    G_BLOCK_K: tl.constexpr,
    G_SPLITS: tl.constexpr,
    G_STAGES: tl.constexpr,
    G_PREFETCH: tl.constexpr,
    D_ROWS: tl.constexpr,
    D_BLOCK: tl.constexpr,
    D_BLOCK_K: tl.constexpr,
    D_SPLITS: tl.constexpr,
    D_STAGES: tl.constexpr,
    D_PREFETCH: tl.constexpr,
    SCALED: tl.constexpr,
    COUNTERS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program p: pieces p, p + programs, ... of each product; for their arguments see `product`."""
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    if OVERLAP and O_PREFETCH > 0:
        ask_for_weights(p, w_o, C, A, O_ROWS, O_BLOCK, O_BLOCK_K, O_SPLITS, O_PREFETCH, False)
    wait(OVERLAP)
    if first_stage <= 0:
        O_UNITS: tl.constexpr = (C + O_ROWS - 1) // O_ROWS * O_SPLITS
        for unit in range(p, O_UNITS, programs):
            product(
                unit, o, w_o, scales_o, norm, x, middle, partial_o, arrived, M, C, o_stride, x_stride, eps, A, BLOCK_M,
                O_ROWS, O_BLOCK, O_BLOCK_K, O_SPLITS, O_STAGES, SCALED, False, False, True,
            )  # fmt: skip
    if (first_stage <= 0) & (last_stage >= 1):
        if OVERLAP and G_PREFETCH > 0:
            ask_for_weights(p, w_gate_up, F, C, G_ROWS, G_BLOCK, G_BLOCK_K, G_SPLITS, G_PREFETCH, True)
        meet(meeting)
    if (first_stage <= 1) & (last_stage >= 1):
        G_UNITS: tl.constexpr = (F + G_ROWS - 1) // G_ROWS * G_SPLITS
        for unit in range(p, G_UNITS, programs):
            product(
                unit, middle, w_gate_up, scales_gate_up, norm, x, inner, partial_gate, arrived + COUNTERS, M, F, C, C,
                eps, C, BLOCK_M, G_ROWS, G_BLOCK, G_BLOCK_K, G_SPLITS, G_STAGES, SCALED, True, True, False,
            )  # fmt: skip
    if (first_stage <= 1) & (last_stage >= 2):
        if OVERLAP and D_PREFETCH > 0:
            ask_for_weights(p, w_down, C, F, D_ROWS, D_BLOCK, D_BLOCK_K, D_SPLITS, D_PREFETCH, False)
        meet(meeting)
    if last_stage >= 2:
        D_UNITS: tl.constexpr = (C + D_ROWS - 1) // D_ROWS * D_SPLITS
        for unit in range(p, D_UNITS, programs):
            product(
                unit, inner, w_down, scales_down, norm, middle, out, partial_down, arrived + 2 * COUNTERS, M, C, F, C,
                eps, F, BLOCK_M, D_ROWS, D_BLOCK, D_BLOCK_K, D_SPLITS, D_STAGES, SCALED, False, False, True,
            )  # fmt: skip


def close_layer(
    x: Tensor,
    o: Tensor,
    o_proj: Weight,
    norm: Tensor,
    eps: float,
    gate_up: Weight,
    down: Weight,
    tiles: LayerTiles | None = None,
) -> Tensor:
    """`Ops.close_layer` with gate and up as one matrix: [M, C]. Weights are all of 16 bits or all Float8Weight.

    `tiles` is for measuring others. Programs of the interpreter run one after the other and cannot meet: there each
    product is a launch.
    """
    weights = (o_proj, gate_up, down)
    scaled = isinstance(o_proj, Float8Weight)
    assert all(isinstance(weight, Float8Weight) == scaled for weight in weights)
    w = [weight.values if isinstance(weight, Float8Weight) else weight for weight in weights]
    scales = [weight.scales if isinstance(weight, Float8Weight) else weight for weight in weights]
    num_rows, hidden = x.shape
    attended, inner = o.shape[1], w[2].shape[1]
    x, o = (y if y.stride(1) == 1 else y.contiguous() for y in (x, o))
    device = limits(x.device)
    t = tiles or layer_tiles(num_rows, attended, hidden, inner, device)
    block_m = block_of_rows(num_rows)
    assert max(t.output.units(hidden), t.gate.units(inner), t.down.units(hidden)) <= _COUNTERS
    middle, out = (torch.empty(num_rows, hidden, dtype=x.dtype, device=x.device) for _ in range(2))
    scratch = (t.output.scratch(hidden, block_m, False), t.gate.scratch(inner, block_m, True))
    for stages in ((0, 2),) if x.is_cuda else ((0, 0), (1, 1), (2, 2)):
        if stages[0] == 0:
            h = torch.empty(num_rows, inner, dtype=x.dtype, device=x.device)
            partial = [torch.empty(size, dtype=torch.float32, device=x.device) for size in scratch]
            partial.append(torch.empty(t.down.scratch(hidden, block_m, False), dtype=torch.float32, device=x.device))
        _close_layer_kernel[t.num_programs,](
            o,
            x,
            *w,
            *scales,
            norm,
            middle,
            h,
            out,
            *partial,
            arrival_counters(x.device),
            meeting_counter(x.device, t.num_programs),
            num_rows,
            o.stride(0),
            x.stride(0),
            eps,
            *stages,
            A=attended,
            C=hidden,
            F=inner,
            BLOCK_M=block_m,
            **_constants("O", t.output),
            **_constants("G", t.gate),
            **_constants("D", t.down),
            SCALED=scaled,
            COUNTERS=_COUNTERS,
            OVERLAP=device.early_launch,
            num_warps=t.num_warps,
            **launch_options(device),
        )
    return out


def _constants(name: str, t: ProductTiles) -> dict[str, int]:
    return {
        f"{name}_ROWS": t.rows,
        f"{name}_BLOCK": t.block_n,
        f"{name}_BLOCK_K": t.block_k,
        f"{name}_SPLITS": t.splits,
        f"{name}_STAGES": t.num_stages,
        f"{name}_PREFETCH": t.prefetch,
    }
