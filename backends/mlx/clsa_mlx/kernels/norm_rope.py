"""norm_rope in one launch, without rounding between the norm and the rotation."""

from __future__ import annotations

import mlx.core as mx

from clsa_mlx.kernels import THREADS
from clsa_mlx.kernels.load import load


def norm_rope(x: mx.array, weight: mx.array, eps: float, positions: mx.array, frequencies: mx.array) -> mx.array:
    """As `Ops.norm_rope`, with frequencies [D / 2] float32: position times frequency is the angle of a pair."""
    return load("norm_rope", ("x", "weight", "epsilon", "positions", "frequencies"), ("out",), ("rope",))(
        inputs=[x, weight, eps, positions, frequencies],
        template=[("T", x.dtype), ("D", x.shape[-1])],
        grid=(x.size // x.shape[-1] * 32, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]
