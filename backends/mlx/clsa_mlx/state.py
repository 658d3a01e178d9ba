"""Memories and windows: rows of K, V and K_idx that are written in place.

Behind the rows that were asked for lie two of our own: the zero row, never written, which stands in wherever a query
sees nothing (what is masked is multiplied by zero, so it has to be finite), and the last row, which takes what a
mapping of -1 discards: MLX counts negative indices from the end.

MLX has no type for float8 E4M3: such rows are uint8, and nothing else in this backend is.

A write costs its own rows and no copy of the buffer if nothing holds the buffer when MLX comes to it. The ops see to
their part by assigning to the array they were given, so that an old Memory or Window that somebody still has does not
hold the old buffer. The caller must not keep slices or reshaped views, and what was given to `evaluate` is held until
the device is through with it. MLX runs at most ten tasks ahead, fewer than lie between the writes of two steps of a
model; but writes issued back to back, with nothing in between, find the buffer held and copy it.
"""

from __future__ import annotations

import mlx.core as mx

from clsa.config import FP8, MODEL_DTYPE, PAGE_SIZE, MemoryDtypes
from clsa.errors import BackendError
from clsa.ops import Memory, Window
from clsa_mlx import kernels
from clsa_mlx.kernels.attend import warn_of_head_dim

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16, "int32": mx.int32}
_FLOAT8_NAN = 0x7F

# Rows of a memory, gathered for one layer, that serve the next until something is written: see clsa_mlx.attention.
gathered: dict[tuple[int, ...], tuple[mx.array, mx.array]] = {}


def widened(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Stored rows, E4M3 or not, as `dtype`."""
    return mx.from_fp8(x, dtype) if x.dtype == mx.uint8 else x.astype(dtype)


def _stored(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """`x` as rows of `dtype` hold it. MLX makes 448 of NaN, and `clsa.float8` does not."""
    return mx.where(mx.isnan(x), _FLOAT8_NAN, mx.to_fp8(x)).astype(mx.uint8) if dtype == mx.uint8 else x


def zero_row(rows: mx.array) -> int:
    """The row of a memory or window that is all zeros."""
    return int(rows.shape[0]) - 2


def new_memory(
    rows: int,
    kv_heads: int,
    head_dim: int,
    index_dim: int | None,
    dtype: str,
    stored: MemoryDtypes = MODEL_DTYPE,
) -> Memory:
    if kernels.enabled:
        warn_of_head_dim(head_dim)
    rows = (-(-rows // PAGE_SIZE) + 1) * PAGE_SIZE  # whole pages, and one of our own
    shape = (rows, kv_heads, head_dim)
    k_idx = None if index_dim is None else _zeros((rows, index_dim), stored.index or dtype)
    return Memory(_zeros(shape, stored.kv or dtype), _zeros(shape, stored.kv or dtype), k_idx)


def new_window(slots: int, window: int, kv_heads: int, head_dim: int, dtype: str) -> Window:
    shape = (slots * window + 2, kv_heads, head_dim)
    return Window(_zeros(shape, dtype), _zeros(shape, dtype), window)


def write_memory(memory: Memory, k: mx.array, v: mx.array, k_idx: mx.array | None, slot_mapping: mx.array) -> Memory:
    gathered.clear()
    memory.k[slot_mapping] = _stored(k, memory.k.dtype)
    memory.v[slot_mapping] = _stored(v, memory.v.dtype)
    if memory.k_idx is not None and k_idx is not None:
        memory.k_idx[slot_mapping] = _stored(k_idx, memory.k_idx.dtype)
    return memory


def write_window(window: Window, k: mx.array, v: mx.array, ring_mapping: mx.array) -> Window:
    window.k[ring_mapping] = k
    window.v[ring_mapping] = v
    return window


def copy_window(window: Window, source: mx.array, target: mx.array) -> Window:
    offsets = mx.arange(window.size, dtype=mx.int32)
    source_rows = (source[:, None] * window.size + offsets).reshape(-1)
    target_rows = (target[:, None] * window.size + offsets).reshape(-1)
    window.k[target_rows] = window.k[source_rows]
    window.v[target_rows] = window.v[source_rows]
    return window


def _zeros(shape: tuple[int, ...], dtype: str) -> mx.array:
    zeros = mx.zeros(shape, mx.uint8 if dtype == FP8 else DTYPES[dtype])
    try:
        mx.eval(zeros)  # now, so that a lack of memory shows here and not in a step
    except (RuntimeError, ValueError) as error:
        raise BackendError(
            f"MLX cannot allocate {zeros.nbytes / 1e9:.1f} GB of state ({error}); ask for a smaller memory"
        ) from error
    return zeros
