"""The ops of `clsa.ops.Ops` on MLX arrays. They run on the device that the backend opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from clsa.config import FP8
from clsa.errors import BackendError
from clsa.hostmemory import host_memory_stats
from clsa.ops import Compute, Float8Weight, HeadNorms, QuantizedWeight, Queries, Weight, Window
from clsa_mlx import kernels
from clsa_mlx.attention import dense_attention, gather_attention, sliding_attention
from clsa_mlx.fused import fused, on_gpu
from clsa_mlx.kernels.norm_rope import norm_rope as launch_norm_rope
from clsa_mlx.quantized import quantized_linear, quantized_rows
from clsa_mlx.sample import sample
from clsa_mlx.select import select, take_selection
from clsa_mlx.state import DTYPES, copy_window, new_memory, new_window, widened, write_memory, write_window

name = "mlx"
device = "cpu (MLX)"
temporary_bytes = 256 << 20  # see clsa_mlx.blocks
keeps_quantized = True
no_fp8: Mapping[str, str] = {
    "weights": "backend 'mlx' has no fp8 weights; `clsa convert --quantize 8` makes 8-bit ones that it computes with"
}


# -- arrays ------------------------------------------------------------------------------------------------


def asarray(x: np.ndarray, dtype: str | None = None) -> mx.array:
    x = np.asarray(x, order="C")  # MLX takes no negative strides
    is_bfloat16 = x.dtype == ml_dtypes.bfloat16
    array = mx.array(x.view(np.uint16)).view(mx.bfloat16) if is_bfloat16 else mx.array(x)
    return array if dtype is None else array.astype(DTYPES[dtype])


def quantized_weight(host: QuantizedWeight, dtype: str) -> QuantizedWeight:
    scales, biases = asarray(host.scales, dtype), asarray(host.biases, dtype)
    return QuantizedWeight(asarray(host.packed), scales, biases, host.group_size, host.bits)


def float8_weight(weight: mx.array) -> Float8Weight:
    raise BackendError(no_fp8["weights"])


def asarrays(arrays: Sequence[np.ndarray]) -> list[mx.array]:
    return [asarray(x) for x in arrays]


def fetch(arrays: Sequence[mx.array]) -> Callable[[], list[np.ndarray]]:
    mx.async_eval(*arrays)
    return lambda: [to_numpy(x) for x in arrays]


def record(compute: Compute) -> Compute | None:
    return None


def to_numpy(x: mx.array) -> np.ndarray:
    return np.array(widened(x, mx.float32) if x.dtype in (mx.bfloat16, mx.uint8) else x)


def cast(x: mx.array, dtype: str) -> mx.array:
    return x.astype(DTYPES[dtype])


def itemsize(dtype: str) -> int:
    return 1 if dtype == FP8 else int(DTYPES[dtype].size)


def take(x: mx.array, rows: mx.array) -> mx.array:
    return x[rows]


def concat(arrays: Sequence[mx.array]) -> mx.array:
    return mx.concatenate(list(arrays))


def evaluate(*values: Any) -> None:
    mx.async_eval(*_arrays(values))


def _arrays(value: Any) -> Iterator[mx.array]:
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, dict):
        yield from _arrays(list(value.values()))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _arrays([getattr(value, field.name) for field in fields(value)])


def memory_stats() -> dict[str, int]:
    if not on_gpu():
        return host_memory_stats()
    info = mx.device_info(mx.gpu)
    limit = int(info.get("max_recommended_working_set_size", info["memory_size"]))
    return {
        "total": int(info["memory_size"]),
        "free": max(0, limit - mx.get_active_memory()),
        "peak": mx.get_peak_memory(),
    }


# -- the model's plain functions ---------------------------------------------------------------------------


def embed(weight: Weight, tokens: mx.array) -> mx.array:
    quantized = isinstance(weight, QuantizedWeight)
    # MLX reads out of bounds without a word, and a row without a token has id -1.
    rows = mx.clip(tokens, 0, (weight.packed if quantized else weight).shape[0] - 1)
    return quantized_rows(weight, rows) if quantized else weight[rows]


def linear(x: mx.array, weight: Weight) -> mx.array:
    return quantized_linear(x, weight) if isinstance(weight, QuantizedWeight) else x @ weight.T


def linears(x: mx.array, weights: Sequence[Weight]) -> tuple[mx.array, ...]:
    return tuple(linear(x, weight) for weight in weights)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


def rope(x: mx.array, positions: mx.array, theta: float) -> mx.array:
    # mx.fast.rope would take the positions as offsets, but its kernel uses fast sines, which drift at large angles.
    half = x.shape[-1] // 2
    angles = positions.astype(mx.float32)[:, None, None] * _frequencies(half, theta)  # [T, 1, D / 2]
    cos, sin = mx.cos(angles), mx.sin(angles)
    first, second = x[..., :half], x[..., half:]  # float32 below: the angles are
    rotated = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def norm_rope(x: mx.array, weight: mx.array, eps: float, positions: mx.array, theta: float) -> mx.array:
    if kernels.enabled:
        return launch_norm_rope(x, weight, eps, positions, _frequencies(x.shape[-1] // 2, theta))
    return rope(rms_norm(x, weight, eps), positions, theta)


@lru_cache(maxsize=16)
def _frequencies(half: int, theta: float) -> mx.array:
    return mx.array((theta ** (-np.arange(half) / half)).astype(np.float32))


@fused
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    wide = gate.astype(mx.float32)
    return (wide * mx.sigmoid(wide) * up.astype(mx.float32)).astype(gate.dtype)


def norm_linears(x: mx.array, norm: mx.array, eps: float, weights: Sequence[Weight]) -> tuple[mx.array, ...]:
    return linears(rms_norm(x, norm, eps), weights)


def norm_swiglu(x: mx.array, norm: mx.array, eps: float, gate: Weight, up: Weight) -> mx.array:
    return swiglu(*norm_linears(x, norm, eps, (gate, up)))  # type: ignore[no-any-return]


def add_linear(x: mx.array, y: mx.array, weight: Weight) -> mx.array:
    if isinstance(weight, QuantizedWeight):
        return x + quantized_linear(y, weight)
    return mx.addmm(x, y, weight.T)


def attend_window(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    norms: HeadNorms,
    window: Window,
    queries: Queries,
    ring_mapping: mx.array,
) -> tuple[mx.array, Window]:
    q = norm_rope(q, norms.q, norms.eps, queries.positions, norms.theta)
    k = norm_rope(k, norms.k, norms.eps, queries.positions, norms.theta)
    return sliding_attention(q, k, v, window, queries), write_window(window, k, v, ring_mapping)


__all__ = [
    "add_linear",
    "asarray",
    "asarrays",
    "attend_window",
    "cast",
    "concat",
    "copy_window",
    "dense_attention",
    "device",
    "embed",
    "evaluate",
    "fetch",
    "float8_weight",
    "gather_attention",
    "itemsize",
    "keeps_quantized",
    "linear",
    "linears",
    "memory_stats",
    "name",
    "new_memory",
    "new_window",
    "no_fp8",
    "norm_linears",
    "norm_rope",
    "norm_swiglu",
    "quantized_weight",
    "record",
    "rms_norm",
    "sample",
    "select",
    "sliding_attention",
    "swiglu",
    "take",
    "take_selection",
    "temporary_bytes",
    "to_numpy",
    "write_memory",
    "write_window",
]
