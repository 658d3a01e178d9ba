"""Group-wise 4- and 8-bit weights, kept as they are: mx.quantized_matmul, and rows dequantised as they are taken."""

from __future__ import annotations

import mlx.core as mx

from clsa.ops import QuantizedWeight
from clsa_mlx.fused import on_gpu


def quantized_linear(x: mx.array, weight: QuantizedWeight) -> mx.array:
    """x @ w.T: [..., in] -> [..., out], in the dtype of x."""
    wide, scales, biases = x, weight.scales, weight.biases
    if not on_gpu():  # MLX's CPU kernel sums in the dtype of its inputs; the Metal one in float32
        wide, scales, biases = (array.astype(mx.float32) for array in (wide, scales, biases))
    out = mx.quantized_matmul(
        wide, weight.packed, scales, biases, transpose=True, group_size=weight.group_size, bits=weight.bits
    )
    return out.astype(x.dtype)


def quantized_rows(weight: QuantizedWeight, rows: mx.array) -> mx.array:
    """Rows of w, all of which exist: [R] -> [R, in], in the dtype of the scales, rounded to it once."""
    scales, biases = (array[rows].astype(mx.float32) for array in (weight.scales, weight.biases))
    out = mx.dequantize(weight.packed[rows], scales, biases, group_size=weight.group_size, bits=weight.bits)
    return out.astype(weight.scales.dtype)
