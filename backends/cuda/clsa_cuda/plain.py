"""The plain functions of the model, and moving arrays: see `clsa.ops.Ops` for shapes and meaning."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.config import FP8
from clsa.ops import Float8Weight, QuantizedWeight, Weight

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
}
FLOAT8 = torch.float8_e4m3fn
MAX_FLOAT8 = torch.finfo(FLOAT8).max


def cast(x: Tensor, dtype: str) -> Tensor:
    return x.to(DTYPES[dtype])


def itemsize(dtype: str) -> int:
    return FLOAT8.itemsize if dtype == FP8 else DTYPES[dtype].itemsize


def to_float8(x: Tensor) -> Tensor:
    """Round to E4M3 as `clsa.float8` says; torch alone would make NaN of what is too large."""
    return x.clamp(-MAX_FLOAT8, MAX_FLOAT8).to(FLOAT8)


def float8_weight(weight: Tensor) -> Float8Weight:
    wide = weight.float()
    largest = wide.abs().amax(1)
    scales = largest / torch.full_like(largest, MAX_FLOAT8)  # by a number, a GPU would multiply with its inverse
    scales = torch.where(scales == 0, 1.0, scales)
    return Float8Weight(to_float8(wide / scales[:, None]), scales)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as an array, [out, in]: a Float8Weight is rounded to `dtype` once, anything else stays what it is."""
    if not isinstance(weight, Float8Weight):
        return weight
    return (weight.values.float() * weight.scales[:, None]).to(dtype)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """w = scale * q + bias: [out, in] in the dtype of the scales, rounded to it once; `packed` viewed as uint8."""
    q = weight.packed
    if weight.bits == 4:
        q = torch.stack([q & 15, q >> 4], dim=-1)
    groups = q.reshape(*weight.scales.shape, weight.group_size).float()
    wide = torch.addcmul(weight.biases.float()[..., None], weight.scales.float()[..., None], groups)
    return wide.to(weight.scales.dtype).flatten(1)


def take(x: Tensor, rows: Tensor, behind: Tensor | None = None) -> Tensor:
    if behind is not None:
        x = torch.cat([x, behind])
    if x.dtype == FLOAT8:  # torch has few functions for it, and moves bytes just as well
        return x.view(torch.uint8).index_select(0, rows).view(FLOAT8)
    return x.index_select(0, rows)


def concat(arrays: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(arrays))


def embed(weight: Tensor, tokens: Tensor) -> Tensor:
    # -1 is what `sample` gives where there is nothing to sample from. A step may run before the host has seen it,
    # and an index out of range on a GPU would end the process.
    return F.embedding(tokens.clamp(min=0), weight)


def linear(x: Tensor, weight: Weight) -> Tensor:
    return F.linear(x, dense(weight, x.dtype))


def linears(x: Tensor, weights: Sequence[Weight]) -> tuple[Tensor, ...]:
    return tuple(linear(x, weight) for weight in weights)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


@functools.lru_cache(maxsize=16)
def frequencies(half: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(half, dtype=torch.float64) / half
    return torch.pow(theta, -exponents).float().to(device)


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None, None].float() * frequencies(half, theta, x.device)  # [T, 1, D / 2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half].float(), x[..., half:].float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def norm_rope(x: Tensor, weight: Tensor, eps: float, positions: Tensor, theta: float) -> Tensor:
    return rope(rms_norm(x, weight, eps), positions, theta)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def add_linear(x: Tensor, y: Tensor, weight: Weight) -> Tensor:
    return torch.addmm(x, y, dense(weight, y.dtype).T)
