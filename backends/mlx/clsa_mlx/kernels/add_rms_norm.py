"""A residual sum and the norm that follows it, in one launch."""

from __future__ import annotations

import mlx.core as mx

from clsa_mlx.kernels import THREADS
from clsa_mlx.kernels.load import load


def add_rms_norm(
    x: mx.array, y: mx.array, weight: mx.array, eps: float, threads: int = THREADS
) -> tuple[mx.array, mx.array]:
    """x + y rounded to its dtype, and `Ops.rms_norm` of that: x and y [T, C] of one dtype, weight [C]."""
    total, normed = load("add_rms_norm", ("x", "y", "weight", "epsilon"), ("sum", "normed"))(
        inputs=[x, y, weight, eps],
        template=[("T", x.dtype), ("C", x.shape[-1]), ("THREADS", threads)],
        grid=(x.shape[0] * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape, x.shape],
        output_dtypes=[x.dtype, x.dtype],
    )
    return total, normed
