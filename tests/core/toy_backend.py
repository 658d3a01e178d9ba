"""A fourth backend, as somebody else might write one: float32, padded and batched, on arrays of its own.

It imports nothing of clsa but the protocol's values. Its array has exactly what shared code may use: `shape`,
`reshape` and `+`; anything else fails here first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clsa.ops import Compute, Device, HeadNorms, Memory, Queries, Sampled, SamplingBatch, Selection, StepSize, Window

PAGE = 64
name = "toy"
device = "cpu (the toy of the tests)"
step_size = StepSize(4, 128)
temporary_bytes = 1 << 26
no_fp8 = {"memory": "the toy has no fp8", "weights": "the toy has no fp8"}


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    """An array that does nothing but what the protocol promises."""

    inside: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inside.shape

    def reshape(self, *shape: int) -> Box:
        return Box(self.inside.reshape(*shape))

    def __add__(self, other: Box) -> Box:
        return Box(self.inside + other.inside)


def asarray(x: np.ndarray, dtype: str | None = None) -> Box:
    is_number = x.dtype.kind in "iub" and dtype is None
    return Box(np.array(x) if is_number else np.array(x, np.int32 if dtype == "int32" else np.float32))


def asarrays(arrays: Sequence[np.ndarray]) -> list[Box]:
    return [asarray(x) for x in arrays]


def fetch(arrays: Sequence[Box]) -> Callable[[], list[np.ndarray]]:
    return lambda: [to_numpy(x) for x in arrays]


def record(compute: Compute) -> Compute | None:
    return None


def to_numpy(x: Box) -> np.ndarray:
    return x.inside.copy()


def cast(x: Box, dtype: str) -> Box:
    return Box(x.inside.astype(np.int32 if dtype == "int32" else np.float32))


def itemsize(dtype: str) -> int:
    return 4


def take(x: Box, rows: Box, behind: Box | None = None) -> Box:
    return Box((x if behind is None else concat([x, behind])).inside[rows.inside])


def concat(arrays: Sequence[Box]) -> Box:
    return Box(np.concatenate([array.inside for array in arrays]))


def evaluate(*values: Any) -> None:
    pass


def memory_stats() -> dict[str, int]:
    return {"total": 1 << 28, "free": 1 << 27, "peak": 1 << 20}


def embed(weight: Box, tokens: Box) -> Box:
    return Box(weight.inside[np.maximum(tokens.inside, 0)])


def linear(x: Box, weight: Box) -> Box:
    return Box(np.einsum("...i,oi->...o", x.inside, weight.inside))


def linears(x: Box, weights: Sequence[Box]) -> tuple[Box, ...]:
    return tuple(linear(x, weight) for weight in weights)


def norm_linears(x: Box, norm: Box, eps: float, weights: Sequence[Box], dtype: str | None = None) -> tuple[Box, ...]:
    projected = linears(rms_norm(x, norm, eps), weights)
    return projected if dtype is None else tuple(cast(y, dtype) for y in projected)


def norm_swiglu(x: Box, norm: Box, eps: float, gate: Box, up: Box) -> Box:
    return swiglu(*norm_linears(x, norm, eps, (gate, up)))


def add_linear(x: Box, y: Box, weight: Box) -> Box:
    return x + linear(y, weight)


def close_layer(x: Box, o: Box, o_proj: Box, norm: Box, eps: float, gate: Box, up: Box, down: Box) -> Box:
    x = add_linear(x, o, o_proj)
    return add_linear(x, norm_swiglu(x, norm, eps, gate, up), down)


def norm_rope(x: Box, weight: Box, eps: float, positions: Box, theta: float) -> Box:
    return rope(rms_norm(x, weight, eps), positions, theta)


def rms_norm(x: Box, weight: Box, eps: float) -> Box:
    norm = np.linalg.norm(x.inside, axis=-1, keepdims=True) / np.sqrt(x.shape[-1])
    return Box(x.inside / np.sqrt(norm**2 + np.float32(eps)) * weight.inside)


def rope(x: Box, positions: Box, theta: float) -> Box:
    half = x.shape[-1] // 2
    turns = np.exp(1j * positions.inside[:, None, None] * theta ** (-np.arange(half) / half))
    turned = (x.inside[..., :half] + 1j * x.inside[..., half:]) * turns
    return Box(np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32))


def swiglu(gate: Box, up: Box) -> Box:
    return Box(gate.inside * 0.5 * (1 + np.tanh(gate.inside / 2)) * up.inside)


# -- state: values in, new values out ----------------------------------------------------------------------------


def new_memory(rows: int, kv_heads: int, head_dim: int, index_dim: int | None, dtype: str, stored: Any) -> Memory:
    k, v = (Box(np.zeros((rows, kv_heads, head_dim), np.float32)) for _ in range(2))
    return Memory(k, v, None if index_dim is None else Box(np.zeros((rows, index_dim), np.float32)))


def new_window(slots: int, window: int, kv_heads: int, head_dim: int, dtype: str) -> Window:
    k, v = (Box(np.zeros((slots * window, kv_heads, head_dim), np.float32)) for _ in range(2))
    return Window(k, v, window)


def _written(old: Box, new: Box, mapping: Box) -> Box:
    out, kept = old.inside.copy(), mapping.inside >= 0
    out[mapping.inside[kept]] = new.inside[kept]
    return Box(out)


def write_memory(memory: Memory, k: Box, v: Box, k_idx: Box | None, slot_mapping: Box) -> Memory:
    index = memory.k_idx if k_idx is None else _written(memory.k_idx, k_idx, slot_mapping)  # type: ignore[arg-type]
    return Memory(_written(memory.k, k, slot_mapping), _written(memory.v, v, slot_mapping), index)


def write_window(window: Window, k: Box, v: Box, ring_mapping: Box) -> Window:
    return Window(_written(window.k, k, ring_mapping), _written(window.v, v, ring_mapping), window.size)


def copy_window(window: Window, source: Box, target: Box) -> Window:
    rows = np.arange(window.size)
    read = (source.inside[:, None] * window.size + rows).reshape(-1)
    write = Box((target.inside[:, None] * window.size + rows).reshape(-1))
    k, v = (_written(ring, Box(ring.inside[read]), write) for ring in (window.k, window.v))
    return Window(k, v, window.size)


# -- routing and attention, for all queries at once over padded columns ------------------------------------------


def _rows(queries: Queries, positions: np.ndarray) -> np.ndarray:
    """Physical rows of positions [T, S], 0 where a position is not visible."""
    table = queries.block_table.inside[queries.sequence.inside]  # [T, M]
    seen = (positions >= 0) & (positions <= queries.positions.inside[:, None])
    pages = np.take_along_axis(table, np.where(seen, positions, 0) // PAGE, axis=1)
    return np.where(seen, pages * PAGE + positions % PAGE, 0)


def _all_positions(queries: Queries) -> np.ndarray:
    """[T, S]: 0, 1, ... up to each query's own position, then -1."""
    columns = np.arange(max(queries.context_lens))[None]
    return np.where(columns <= queries.positions.inside[:, None], columns, -1)


def _attend(q: Box, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> Box:
    """q [T, H, D] over k, v [T, S, G, D] where seen [T, S]."""
    num_tokens, _, head_dim = q.shape
    groups = q.inside.reshape(num_tokens, k.shape[2], -1, head_dim)  # [T, G, H / G, D]
    scores = np.einsum("tghd,tsgd->tghs", groups, k) / np.float32(np.sqrt(head_dim))
    mask = seen[:, None, None, :]
    highest = np.where(mask, scores, -np.inf).max(axis=-1, keepdims=True, initial=-1e30)
    weights = np.where(mask, np.exp(np.minimum(scores - highest, 0)), 0)
    values = np.where(seen[:, :, None, None], v, 0)
    total = np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    return Box(np.einsum("tghs,tsgd->tghd", weights / total, values).reshape(q.shape).astype(np.float32))


def select(q_idx: Box, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
    assert memory.k_idx is not None
    positions = _all_positions(queries)
    scores = np.einsum("ti,tsi->ts", q_idx.inside, memory.k_idx.inside[_rows(queries, positions)])
    scores = np.where(np.isnan(scores) | (positions < 0), -np.inf, scores)
    blocks = -(-scores.shape[1] // block_size)
    padding = ((0, 0), (0, blocks * block_size - scores.shape[1]))
    best = np.pad(scores, padding, constant_values=-np.inf).reshape(len(scores), blocks, block_size).max(axis=2)
    chosen = np.argsort(-best, axis=1, kind="stable")[:, : k // block_size]
    columns = (chosen[:, :, None] * block_size + np.arange(block_size)).reshape(len(scores), -1)
    columns = np.where(columns <= queries.positions.inside[:, None], columns, 1 << 30)
    columns = np.sort(np.pad(columns, ((0, 0), (0, max(0, k - columns.shape[1]))), constant_values=1 << 30), axis=1)
    valid = columns < 1 << 30
    found = np.where(valid, columns, -1)
    rows = np.where(valid, _rows(queries, found), -1)
    return Selection(Box(found.astype(np.int32)), Box(rows.astype(np.int32)), Box(valid.sum(axis=1).astype(np.int32)))


def take_selection(selection: Selection, rows: Box) -> Selection:
    return Selection(take(selection.positions, rows), take(selection.rows, rows), take(selection.lengths, rows))


def gather_attention(q: Box, memory: Memory, selection: Selection) -> Box:
    seen, rows = selection.rows.inside >= 0, np.maximum(selection.rows.inside, 0)
    return _attend(q, memory.k.inside[rows], memory.v.inside[rows], seen)


def dense_attention(q: Box, memory: Memory, queries: Queries) -> Box:
    positions = _all_positions(queries)
    rows = _rows(queries, positions)
    return _attend(q, memory.k.inside[rows], memory.v.inside[rows], positions >= 0)


def sliding_attention(q: Box, k: Box, v: Box, window: Window, queries: Queries) -> Box:
    starts = np.array(queries.cu_seqlens[:-1])[queries.sequence.inside]  # row of the chunk's first token
    first = queries.positions.inside[starts][:, None]
    positions = queries.positions.inside[:, None] - np.arange(window.size)[None]  # [T, W], newest first
    slots = queries.window_slots.inside[queries.sequence.inside][:, None]
    ring = slots * window.size + positions % window.size
    chunk = np.clip(starts[:, None] + positions - first, 0, len(k.inside) - 1)
    is_new = (positions >= first)[:, :, None, None]
    seen_k = np.where(is_new, k.inside[chunk], window.k.inside[ring])
    seen_v = np.where(is_new, v.inside[chunk], window.v.inside[ring])
    return _attend(q, seen_k, seen_v, positions >= 0)


def attend_window(
    q: Box, k: Box, v: Box, norms: HeadNorms, window: Window, queries: Queries, ring_mapping: Box
) -> tuple[Box, Window]:
    q = norm_rope(q, norms.q, norms.eps, queries.positions, norms.theta)
    k = norm_rope(k, norms.k, norms.eps, queries.positions, norms.theta)
    return sliding_attention(q, k, v, window, queries), write_window(window, k, v, ring_mapping)


# -- sampling ----------------------------------------------------------------------------------------------------


def sample(logits: Box, sampling: SamplingBatch) -> Sampled:
    z = logits.inside
    if not sampling.all_greedy or sampling.penalty_tokens is not None or sampling.num_logprobs is not None:
        raise NotImplementedError("the toy is greedy and nothing else")
    sound = np.isfinite(z.max(axis=1))
    return Sampled(Box(np.where(sound, z.argmax(axis=1), -1).astype(np.int32)), None, None, None)


class _Backend:
    name = name

    def devices(self) -> list[Device]:
        return [Device("cpu", "cpu", True, "a toy")]

    def open(self, device: str | None = None) -> Any:
        return sys.modules[__name__]


backend = _Backend()
