"""Arrays of the specification: NumPy float64, after weights were rounded to the asked dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from clsa import float8
from clsa.config import FP8
from clsa.hostmemory import host_memory_stats
from clsa.ops import Array, Compute, Float8Weight, QuantizedWeight
from clsa.quantization import dequantize

_NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int32": np.int32,
}


def asarray(x: np.ndarray, dtype: str | None = None) -> Array:
    if dtype is not None:
        x = x.astype(_NUMPY_DTYPES[dtype])
    is_float = x.dtype.kind == "f" or x.dtype == ml_dtypes.bfloat16
    return x.astype(np.float64) if is_float else x


def quantized_weight(host: QuantizedWeight, dtype: str) -> Array:
    scales, biases = asarray(host.scales, dtype), asarray(host.biases, dtype)
    return dequantize(QuantizedWeight(host.packed, scales, biases, host.group_size, host.bits))


def float8_weight(weight: Array) -> Float8Weight:
    return float8.float8_weight(weight)


def asarrays(arrays: Sequence[np.ndarray]) -> list[Array]:
    return [asarray(x) for x in arrays]


def fetch(arrays: Sequence[Array]) -> Callable[[], list[np.ndarray]]:
    return lambda: [to_numpy(x) for x in arrays]


def record(compute: Compute) -> Compute | None:
    return None


def to_numpy(x: Array) -> np.ndarray:
    return np.asarray(x, np.float32 if x.dtype in (np.float64, float8.FLOAT8) else None)


def cast(x: Array, dtype: str) -> Array:
    return x.astype(np.int32) if dtype == "int32" else x.astype(np.float64)


def itemsize(dtype: str) -> int:
    return 1 if dtype == FP8 else 8


def take(x: Array, rows: Array, behind: Array | None = None) -> Array:
    return (x if behind is None else np.concatenate([x, behind]))[rows]


def concat(arrays: Sequence[Array]) -> Array:
    return np.concatenate(arrays)


def evaluate(*values: Any) -> None:
    pass


def memory_stats() -> dict[str, int]:
    return host_memory_stats()


def wide(x: Array) -> Array:
    """What was stored, E4M3 or float64, as float64."""
    return x.astype(np.float64)
