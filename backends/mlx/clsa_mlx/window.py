"""Rotary positions, and what a sliding layer does between its projections."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from clsa.ops import HeadNorms, Queries, Window
from clsa_mlx import kernels
from clsa_mlx.attention import sliding_attention
from clsa_mlx.kernels.attend import has_kernel
from clsa_mlx.kernels.attend_window import attend_window as launch_attend_window
from clsa_mlx.kernels.norm_rope import norm_rope as launch_norm_rope
from clsa_mlx.linears import rms_norm
from clsa_mlx.state import write_window


def norm_rope(x: mx.array, weight: mx.array, eps: float, positions: mx.array, theta: float) -> mx.array:
    if kernels.enabled:
        return launch_norm_rope(x, weight, eps, positions, frequencies(x.shape[-1] // 2, theta))
    return rope(rms_norm(x, weight, eps), positions, theta)


def rope(x: mx.array, positions: mx.array, theta: float) -> mx.array:
    # mx.fast.rope would take the positions as offsets, but its kernel uses fast sines, which drift at large angles.
    half = x.shape[-1] // 2
    angles = positions.astype(mx.float32)[:, None, None] * frequencies(half, theta)  # [T, 1, D / 2]
    cos, sin = mx.cos(angles), mx.sin(angles)
    first, second = x[..., :half], x[..., half:]  # float32 below: the angles are
    rotated = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


@lru_cache(maxsize=16)
def frequencies(half: int, theta: float) -> mx.array:
    """Angle per position of each pair: [half] float32."""
    return mx.array((theta ** (-np.arange(half) / half)).astype(np.float32))


def attend_window(
    q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms, window: Window, queries: Queries, ring_mapping: mx.array
) -> tuple[mx.array, Window]:
    if kernels.enabled and queries.one_each and has_kernel(q, window.k):
        o, k = launch_attend_window(q, k, v, norms, frequencies(q.shape[-1] // 2, norms.theta), window, queries)
    else:
        q = norm_rope(q, norms.q, norms.eps, queries.positions, norms.theta)
        k = norm_rope(k, norms.k, norms.eps, queries.positions, norms.theta)
        o = sliding_attention(q, k, v, window, queries)
    return o, write_window(window, k, v, ring_mapping)
