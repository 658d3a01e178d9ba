"""The model's plain functions: embedding, norms, products, positions, feed-forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clsa.ops import Array, Float8Weight, Weight
from clsa.spec.arrays import cast, wide


def embed(weight: Array, tokens: Array) -> Array:
    return weight[np.maximum(tokens, 0)]


def linear(x: Array, weight: Weight) -> Array:
    if isinstance(weight, Float8Weight):
        weight = wide(weight.values) * weight.scales[:, None]
    return x @ weight.T


def linears(x: Array, weights: Sequence[Weight]) -> tuple[Array, ...]:
    return tuple(linear(x, weight) for weight in weights)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x: Array, positions: Array, theta: float) -> Array:
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)
    angles = positions[:, None, None] * frequencies  # [T, 1, D / 2]
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def norm_linears(
    x: Array, norm: Array, eps: float, weights: Sequence[Weight], dtype: str | None = None
) -> tuple[Array, ...]:
    projected = linears(rms_norm(x, norm, eps), weights)
    return projected if dtype is None else tuple(cast(y, dtype) for y in projected)


def norm_swiglu(x: Array, norm: Array, eps: float, gate: Weight, up: Weight) -> Array:
    return swiglu(*norm_linears(x, norm, eps, (gate, up)))


def add_linear(x: Array, y: Array, weight: Weight) -> Array:
    return x + linear(y, weight)


def close_layer(
    x: Array, o: Array, o_proj: Weight, norm: Array, eps: float, gate: Weight, up: Weight, down: Weight
) -> Array:
    x = add_linear(x, o, o_proj)
    return add_linear(x, norm_swiglu(x, norm, eps, gate, up), down)


def norm_rope(x: Array, weight: Array, eps: float, positions: Array, theta: float) -> Array:
    return rope(rms_norm(x, weight, eps), positions, theta)


def swiglu(gate: Array, up: Array) -> Array:
    return gate / (1.0 + np.exp(-gate)) * up
