"""`write_memory` and `write_window`: rows of a step to where they belong, all tensors in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from clsa.ops import Memory, Window
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.overlap import wait
from clsa_cuda.kernels.tiles import launch_options, limits, next_power_of_2


@triton.jit
def _store(to, x, mask):
    """Store a row as what it is kept in. Triton rounds to E4M3 as `clsa.float8` says, but for what is too large."""
    if to.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(to, x.to(to.dtype.element_ty), mask=mask)


@launcher
@triton.jit
def _write_kernel(
    k,  # [T, E]
    v,  # [T, E]
    k_idx,  # [T, I]
    mapping,  # [T]
    to_k,  # [N, E]
    to_v,  # [N, E]
    to_k_idx,  # [N, I]
    k_stride,
    v_stride,
    k_idx_stride,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    I: tl.constexpr,  # 0: there is no index key
    BLOCK_I: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program t: token t, or nothing if it is mapped to -1."""
    wait(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(mapping + t).to(tl.int64)
    if row >= 0:
        e = tl.arange(0, BLOCK_E)
        _store(to_k + row * E + e, tl.load(k + t * k_stride + e, mask=e < E), e < E)
        _store(to_v + row * E + e, tl.load(v + t * v_stride + e, mask=e < E), e < E)
        if I > 0:
            i = tl.arange(0, BLOCK_I)
            _store(to_k_idx + row * I + i, tl.load(k_idx + t * k_idx_stride + i, mask=i < I), i < I)


def _write(
    to: tuple[Tensor, Tensor, Tensor | None], new: tuple[Tensor, Tensor, Tensor | None], mapping: Tensor
) -> None:
    k, v, k_idx = new
    index_dim = 0 if k_idx is None else k_idx.shape[1]
    row_size = k.shape[1] * k.shape[2]
    if k.shape[0] == 0:
        return
    assert all(x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) for x in (k, v))
    assert k_idx is None or k_idx.stride(1) == 1
    assert mapping.is_contiguous() and all(x is None or x.is_contiguous() for x in to)
    _write_kernel[k.shape[0],](
        k,
        v,
        k if k_idx is None else k_idx,
        mapping,
        to[0],
        to[1],
        to[0] if to[2] is None else to[2],
        k.stride(0),
        v.stride(0),
        0 if k_idx is None else k_idx.stride(0),
        E=row_size,
        BLOCK_E=next_power_of_2(row_size),
        I=index_dim,
        BLOCK_I=next_power_of_2(max(1, index_dim)),
        OVERLAP=limits(k.device).early_launch,
        num_warps=2,
        **launch_options(limits(k.device)),
    )


def write_memory(memory: Memory, k: Tensor, v: Tensor, k_idx: Tensor | None, slot_mapping: Tensor) -> Memory:
    """`Ops.write_memory`."""
    if memory.k_idx is None:
        k_idx = None
    _write((memory.k, memory.v, memory.k_idx), (k, v, k_idx), slot_mapping)
    return memory


def write_window(window: Window, k: Tensor, v: Tensor, ring_mapping: Tensor) -> Window:
    """`Ops.write_window`."""
    _write((window.k, window.v, None), (k, v, None), ring_mapping)
    return window
