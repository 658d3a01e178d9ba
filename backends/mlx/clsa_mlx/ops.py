"""The ops of `clsa.ops.Ops` on MLX arrays. They run on the device that the backend opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from clsa.config import FP8
from clsa.errors import BackendError
from clsa.hostmemory import host_memory_stats
from clsa.ops import Compute, Float8Weight, QuantizedWeight, StepSize, Weight
from clsa_mlx.attention import dense_attention, gather_attention, sliding_attention
from clsa_mlx.fused import on_gpu
from clsa_mlx.linears import add_linear, close_layer, linear, linears, norm_linears, norm_swiglu, rms_norm, swiglu
from clsa_mlx.quantized import quantized_rows
from clsa_mlx.record import Recorder
from clsa_mlx.sample import sample
from clsa_mlx.select import select, take_selection
from clsa_mlx.state import DTYPES, copy_window, new_memory, new_window, widened, write_memory, write_window
from clsa_mlx.trees import arrays_in
from clsa_mlx.window import attend_window, norm_rope

name = "mlx"
device = "cpu (MLX)"
step_size = StepSize(32, 2048)
temporary_bytes = 256 << 20  # see clsa_mlx.blocks
records_rest = False  # a step with prompts takes the GPU longer than the host
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
    # On CPU a compiled function would need a C++ compiler at run time.
    return Recorder(compute) if on_gpu() else None


def to_numpy(x: mx.array) -> np.ndarray:
    return np.array(widened(x, mx.float32) if x.dtype in (mx.bfloat16, mx.uint8) else x)


def cast(x: mx.array, dtype: str) -> mx.array:
    return x.astype(DTYPES[dtype])


def itemsize(dtype: str) -> int:
    return 1 if dtype == FP8 else int(DTYPES[dtype].size)


def take(x: mx.array, rows: mx.array, behind: mx.array | None = None) -> mx.array:
    return (x if behind is None else mx.concatenate([x, behind]))[rows]


def concat(arrays: Sequence[mx.array]) -> mx.array:
    return mx.concatenate(list(arrays))


def evaluate(*values: Any) -> None:
    mx.async_eval(*arrays_in(values))


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


__all__ = [
    "add_linear",
    "asarray",
    "asarrays",
    "attend_window",
    "cast",
    "close_layer",
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
    "records_rest",
    "rms_norm",
    "sample",
    "select",
    "sliding_attention",
    "step_size",
    "swiglu",
    "take",
    "take_selection",
    "temporary_bytes",
    "to_numpy",
    "write_memory",
    "write_window",
]
