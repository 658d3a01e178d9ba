"""What a sequence leaves behind: rows of a memory, and a window's ring."""

from __future__ import annotations

import numpy as np

from clsa import float8
from clsa.config import FP8, MODEL_DTYPE, MemoryDtypes
from clsa.ops import Array, Memory, Window


def new_memory(
    rows: int,
    kv_heads: int,
    head_dim: int,
    index_dim: int | None,
    dtype: str,
    stored: MemoryDtypes = MODEL_DTYPE,
) -> Memory:
    kv, index = (float8.FLOAT8 if name == FP8 else np.float64 for name in (stored.kv, stored.index))
    k_idx = None if index_dim is None else np.zeros((rows, index_dim), index)
    return Memory(np.zeros((rows, kv_heads, head_dim), kv), np.zeros((rows, kv_heads, head_dim), kv), k_idx)


def new_window(slots: int, window: int, kv_heads: int, head_dim: int, dtype: str) -> Window:
    shape = (slots * window, kv_heads, head_dim)
    return Window(np.zeros(shape), np.zeros(shape), window)


def write_memory(memory: Memory, k: Array, v: Array, k_idx: Array | None, slot_mapping: Array) -> Memory:
    kept = slot_mapping >= 0
    for rows, new in ((memory.k, k), (memory.v, v), (memory.k_idx, k_idx)):
        if rows is not None and new is not None:
            rows[slot_mapping[kept]] = float8.to_float8(new[kept]) if rows.dtype == float8.FLOAT8 else new[kept]
    return memory


def write_window(window: Window, k: Array, v: Array, ring_mapping: Array) -> Window:
    kept = ring_mapping >= 0
    window.k[ring_mapping[kept]] = k[kept]
    window.v[ring_mapping[kept]] = v[kept]
    return window


def copy_window(window: Window, source: Array, target: Array) -> Window:
    for ring in (window.k, window.v):
        slots = ring.reshape(-1, window.size, *ring.shape[1:])
        slots[target] = slots[source]
    return window
