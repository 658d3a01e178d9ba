"""Group-wise 4- and 8-bit weights on the host: the numbers that mlx.core.quantize makes, without MLX."""

from __future__ import annotations

import numpy as np

from clsa.config import Quantization
from clsa.ops import QuantizedWeight

_ROWS = 1024  # of a matrix at a time: the float32 copies stay small beside the matrix
_SMALLEST_SCALE = np.float32(1e-7)


def quantize(weight: np.ndarray, how: Quantization) -> QuantizedWeight:
    """A matrix [out, in] of float32, float16 or bfloat16, whose rows are a multiple of the group size, in groups.

    In a group the extreme that is farther from 0 becomes the bias. The scale, about (hi - lo) / (2^bits - 1) and
    directed to the other extreme, is made to divide it, so that 0 stays 0 but for rounding. Scales and biases come
    back in the dtype of `weight`.
    """
    rows, width = weight.shape
    packed = np.empty((rows, width * how.bits // 32), "<u4")
    scales, biases = (np.empty((rows, width // how.group_size), weight.dtype) for _ in range(2))
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so in its scale and bias
        for i in range(0, rows, _ROWS):
            part = slice(i, i + _ROWS)
            groups = weight[part].astype(np.float32).reshape(-1, width // how.group_size, how.group_size)
            q, scales[part], biases[part] = _quantize(groups, np.float32(2**how.bits - 1))
            packed[part] = _pack(q.reshape(-1, width), how.bits)
    return QuantizedWeight(packed, scales, biases, how.group_size, how.bits)


def _quantize(groups: np.ndarray, levels: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, m, group_size] float32 -> integers of that shape, and scales and biases [n, m] not rounded yet."""
    lo, hi = groups.min(axis=-1), groups.max(axis=-1)
    up = np.abs(lo) > np.abs(hi)  # from lo upwards, or from hi downwards
    scale = np.maximum((hi - lo) / levels, _SMALLEST_SCALE)
    scale, edge = np.where(up, scale, -scale), np.where(up, lo, hi)
    steps = np.rint(edge / scale)  # from the edge to 0
    scale = np.where(steps != 0, edge / np.where(steps != 0, steps, np.float32(1)), scale)
    bias = np.where(steps != 0, edge, np.float32(0))
    q = np.rint((groups - bias[..., None]) / scale[..., None])
    return np.clip(q, 0, levels).astype(np.uint8), scale, bias


def _pack(q: np.ndarray, bits: int) -> np.ndarray:
    """[n, in] uint8 -> [n, in * bits / 32] uint32. In memory the first of two neighbours is the low half of a byte."""
    if bits == 4:
        q = q[:, 0::2] | q[:, 1::2] << 4
    return np.ascontiguousarray(q).view("<u4")


def dequantize(weight: QuantizedWeight) -> np.ndarray:
    """w = scale * q + bias of host arrays, [out, in] float32; float64 where scales and biases are."""
    dtype = np.float64 if weight.scales.dtype == np.float64 else np.float32
    q = np.ascontiguousarray(weight.packed, "<u4").view(np.uint8)
    if weight.bits == 4:
        q = np.stack([q & 15, q >> 4], axis=-1)
    out: np.ndarray = q.reshape(*weight.scales.shape, weight.group_size).astype(dtype)
    np.multiply(out, weight.scales[..., None].astype(dtype), out=out)
    np.add(out, weight.biases[..., None].astype(dtype), out=out)
    return out.reshape(len(out), -1)
