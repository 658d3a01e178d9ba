"""The small ops of a layer as one launch each: a step of a small batch is bound by the number of its launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa_cuda import plain
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.overlap import wait
from clsa_cuda.kernels.tiles import cdiv, launch_options, limits, next_power_of_2

_SWIGLU_BLOCK = 1024
_TOKENS_BLOCK = 128


@launcher
@triton.jit
def _take_tokens_kernel(
    tokens,  # [n]
    source,  # [m]
    sampled,  # [s]
    out,  # [m]
    num_tokens,
    size,  # m
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program b: block b of out."""
    wait(OVERLAP)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    place = tl.load(source + i, mask=mask, other=0)
    known = tl.load(tokens + place, mask=mask & (place < num_tokens), other=0)
    late = tl.load(sampled + (place - num_tokens), mask=mask & (place >= num_tokens), other=0)
    tl.store(out + i, tl.where(place < num_tokens, known, late), mask=mask)


@launcher
@triton.jit
def _embed_kernel(weight, tokens, out, C: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr):
    """Program t: the row of weight [V, C] that tokens [T] name, the first for -1; out [T, C]."""
    wait(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    row = tl.maximum(tl.load(tokens + t), 0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    tl.store(out + t * C + c, tl.load(weight + row * C + c, mask=c < C, other=0.0), mask=c < C)


@launcher
@triton.jit
def _rms_norm_kernel(
    x,  # [T, C], rows x_stride apart
    weight,  # [C]
    out,  # [T, C]
    x_stride,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program t: row t."""
    wait(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    mask = c < C
    value = tl.load(x + t * x_stride + c, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / C + eps)
    normed = value * scale * tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + t * C + c, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sine_and_cosine(angle):
    """Of float32 angles of any size, reduced to a turn in float64, where it is cheap. The library's float32 sines take
    far angles through a reduction in local memory: 2,500 instructions that every launch has to fetch."""
    turns = angle.to(tl.float64) * 0.15915494309189535
    turns -= tl.floor(turns + 0.5)
    half = tl.floor(2.0 * turns + 0.5)  # of a turn, -1, 0 or 1: what is left is within a quarter
    x = ((turns - 0.5 * half) * 6.283185307179586).to(tl.float32)
    sign = 1.0 - 2.0 * tl.abs(half).to(tl.float32)
    # Their series to the 13th and 14th power: what is left out is below 1e-9.
    y = x * x
    sine = -1 / 39916800 + y * (1 / 6227020800)
    sine = 1 / 120 + y * (-1 / 5040 + y * (1 / 362880 + y * sine))
    sine = x + x * y * (-1 / 6 + y * sine)
    cosine = 1 / 479001600 + y * (-1 / 87178291200)
    cosine = 1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800 + y * cosine)))
    cosine = 1.0 + y * (-1 / 2 + y * cosine)
    return sign * sine, sign * cosine


@launcher
@triton.jit
def _norm_rope_kernel(
    x,  # [T, H, D], tokens x_stride apart
    weight,  # [D]
    positions,  # [T]
    frequencies,  # [D / 2] float32
    out,  # [T, H, D]
    x_stride,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program t: all heads of token t."""
    wait(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_HALF)
    half = D // 2
    mask = (h < H)[:, None] & (i < half)[None, :]
    place = x + t * x_stride + h[:, None] * D + i[None, :]
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(first * first + second * second, axis=1) / D + eps)
    w_first = tl.load(weight + i, mask=i < half, other=0.0).to(tl.float32)
    w_second = tl.load(weight + half + i, mask=i < half, other=0.0).to(tl.float32)
    # Rounded between norm and rotation, as the two plain ops do.
    first = (first * scale[:, None] * w_first[None, :]).to(out.dtype.element_ty).to(tl.float32)
    second = (second * scale[:, None] * w_second[None, :]).to(out.dtype.element_ty).to(tl.float32)
    angle = tl.load(positions + t).to(tl.float32) * tl.load(frequencies + i, mask=i < half, other=0.0)
    sin, cos = sine_and_cosine(angle)
    sin, cos = sin[None, :], cos[None, :]
    target = out + t * (H * D) + h[:, None] * D + i[None, :]
    tl.store(target, (first * cos - second * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(target + half, (second * cos + first * sin).to(out.dtype.element_ty), mask=mask)


@launcher
@triton.jit
def _swiglu_kernel(gate, up, out, gate_stride, up_stride, F, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Program (t, b): block b of row t. gate and up [T, F], rows their strides apart."""
    wait(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    g = tl.load(gate + t * gate_stride + f, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + t * up_stride + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + t * F + f, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [T, C], without a copy where rows are evenly spaced."""
    return x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1])


def take_tokens(tokens: Tensor, source: Tensor, sampled: Tensor) -> Tensor:
    """`Ops.take` of [n] and, behind them, [s] integers: [m] of them, in one launch."""
    assert tokens.is_contiguous() and source.is_contiguous() and sampled.is_contiguous()
    (size,) = source.shape
    out = torch.empty(size, dtype=tokens.dtype, device=tokens.device)
    if size:
        _take_tokens_kernel[cdiv(size, _TOKENS_BLOCK),](
            tokens,
            source,
            sampled,
            out,
            tokens.shape[0],
            size,
            BLOCK=_TOKENS_BLOCK,
            OVERLAP=limits(tokens.device).early_launch,
            **launch_options(limits(tokens.device)),
            num_warps=1,
        )
    return out


def embed(weight: Tensor, tokens: Tensor) -> Tensor:
    """`Ops.embed`: [V, C], [T] int32 -> [T, C]."""
    (num_tokens,), size = tokens.shape, weight.shape[1]
    out = torch.empty(num_tokens, size, dtype=weight.dtype, device=weight.device)
    if num_tokens:
        _embed_kernel[num_tokens,](
            weight.contiguous(),
            tokens.contiguous(),
            out,
            C=size,
            BLOCK_C=next_power_of_2(size),
            OVERLAP=limits(weight.device).early_launch,
            **launch_options(limits(weight.device)),
            num_warps=4,
        )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`Ops.rms_norm`."""
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, size = rows.shape
    block = next_power_of_2(size)
    _rms_norm_kernel[num_rows,](
        rows,
        weight,
        out,
        rows.stride(0),
        eps,
        C=size,
        BLOCK_C=block,
        OVERLAP=limits(x.device).early_launch,
        **launch_options(limits(x.device)),
        num_warps=max(1, min(8, block // 512)),
    )
    return out


def norm_rope(x: Tensor, weight: Tensor, eps: float, positions: Tensor, theta: float) -> Tensor:
    """`Ops.norm_rope`."""
    num_tokens, heads, head_dim = x.shape
    if x.stride(2) != 1 or (heads > 1 and x.stride(1) != head_dim):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_rope_kernel[num_tokens,](
        x,
        weight,
        positions,
        plain.frequencies(head_dim // 2, theta, x.device),
        out,
        x.stride(0),
        eps,
        H=heads,
        D=head_dim,
        BLOCK_H=next_power_of_2(heads),
        BLOCK_HALF=next_power_of_2(head_dim // 2),
        OVERLAP=limits(x.device).early_launch,
        **launch_options(limits(x.device)),
        num_warps=4,
    )
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`Ops.swiglu`."""
    g, u = _rows(gate), _rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid = (g.shape[0], cdiv(g.shape[1], _SWIGLU_BLOCK))
    _swiglu_kernel[grid](
        g,
        u,
        out,
        g.stride(0),
        u.stride(0),
        g.shape[1],
        BLOCK=_SWIGLU_BLOCK,
        OVERLAP=limits(gate.device).early_launch,
        num_warps=4,
        **launch_options(limits(gate.device)),
    )
    return out
