"""Rotary positions in one launch, alone or behind the RMS norm of each head; exact at large positions."""

from __future__ import annotations

import mlx.core as mx

from clsa_mlx.kernels import THREADS
from clsa_mlx.kernels.load import load


def rope(x: mx.array, positions: mx.array, frequencies: mx.array, threads: int = THREADS) -> mx.array:
    """x [T, heads, D] turned by the angles positions [T] times frequencies [D / 2] float32."""
    return load("rope", ("x", "positions", "frequencies"), ("out",), ("rope",))(
        inputs=[x, positions, frequencies],
        template=[("T", x.dtype), ("D", x.shape[-1])],
        grid=(x.size // 2, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]


def norm_rope(
    x: mx.array, weight: mx.array, eps: float, positions: mx.array, frequencies: mx.array, threads: int = THREADS
) -> mx.array:
    """`rope` of the RMS norm of x [T, heads, D] over its last axis with weight [D], without rounding in between."""
    return load("norm_rope", ("x", "weight", "epsilon", "positions", "frequencies"), ("out",), ("rope",))(
        inputs=[x, weight, eps, positions, frequencies],
        template=[("T", x.dtype), ("D", x.shape[-1])],
        grid=(x.size // x.shape[-1] * 32, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]
