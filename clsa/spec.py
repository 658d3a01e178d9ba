"""The specification: what every op means, in NumPy float64, one obvious line after the other.

Every fast op of every backend is held against the function of the same name here. It is also the backend
"numpy": complete, exact, slow. Weights are rounded to the asked dtype when they arrive; everything after that
is float64. The letters in shapes are those of `clsa.ops`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from typing import cast as typing_cast

import ml_dtypes
import numpy as np

from clsa import float8
from clsa.config import FP8, MODEL_DTYPE, PAGE_SIZE, MemoryDtypes
from clsa.errors import BackendError
from clsa.hostmemory import host_memory_stats
from clsa.ops import (
    Array,
    Compute,
    Device,
    Float8Weight,
    HeadNorms,
    Memory,
    Ops,
    QuantizedWeight,
    Queries,
    Sampled,
    SamplingBatch,
    Selection,
    StepSize,
    Weight,
    Window,
)
from clsa.quantization import dequantize

name = "numpy"
device = "cpu (NumPy float64, the specification)"
step_size = StepSize(32, 2048)
temporary_bytes = 1 << 28  # a query at a time
records_rest = False
keeps_quantized = False
no_fp8: Mapping[str, str] = {}

_NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int32": np.int32,
}


# -- arrays ------------------------------------------------------------------------------------------------


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


# -- the model's plain functions ---------------------------------------------------------------------------


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


# -- state -------------------------------------------------------------------------------------------------


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


def wide(x: Array) -> Array:
    """What was stored, E4M3 or float64, as float64."""
    return x.astype(np.float64)


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


# -- routing and attention ---------------------------------------------------------------------------------


def physical_rows(queries: Queries, sequence: int, positions: Array) -> Array:
    """Where the given positions of a sequence lie in a memory."""
    pages = queries.block_table[sequence, positions // PAGE_SIZE]
    return pages * PAGE_SIZE + positions % PAGE_SIZE


def top_k(scores: Array, k: int, block_size: int) -> Array:
    """Ascending positions of the best: [S] -> [<= k]. NaN counts as -inf, ties go to the lower position."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    num_blocks = -(-len(scores) // block_size)
    padded = np.full(num_blocks * block_size, -np.inf)
    padded[: len(scores)] = scores
    best = padded.reshape(num_blocks, block_size).max(axis=1)
    chosen = np.sort(np.argsort(-best, kind="stable")[: k // block_size])
    positions = (chosen[:, None] * block_size + np.arange(block_size)).reshape(-1)
    return positions[positions < len(scores)]


def select(q_idx: Array, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
    assert memory.k_idx is not None
    num_queries = len(q_idx)
    positions = np.full((num_queries, k), -1, np.int32)
    rows = np.full((num_queries, k), -1, np.int32)
    lengths = np.zeros(num_queries, np.int32)
    for t, (position, sequence) in enumerate(zip(queries.positions, queries.sequence, strict=True)):
        visible = physical_rows(queries, sequence, np.arange(position + 1))
        chosen = top_k(wide(memory.k_idx[visible]) @ q_idx[t], k, block_size)
        lengths[t] = len(chosen)
        positions[t, : len(chosen)] = chosen
        rows[t, : len(chosen)] = visible[chosen]
    return Selection(positions, rows, lengths)


def take_selection(selection: Selection, rows: Array) -> Selection:
    return Selection(selection.positions[rows], selection.rows[rows], selection.lengths[rows])


def attend(q: Array, k: Array, v: Array) -> Array:
    """One query over what it sees: [H, D], [S, G, D] twice -> [H, D]. Head h reads KV head h // (H / G)."""
    num_heads, head_dim = q.shape
    if len(k) == 0:
        return np.zeros_like(q)
    k = np.repeat(k, num_heads // k.shape[1], axis=1)  # [S, H, D]
    v = np.repeat(v, num_heads // v.shape[1], axis=1)
    scores = np.einsum("hd,shd->hs", q, k) / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), v)


def gather_attention(q: Array, memory: Memory, selection: Selection) -> Array:
    out = np.zeros_like(q)
    for t, length in enumerate(selection.lengths):
        rows = selection.rows[t, :length]
        out[t] = attend(q[t], wide(memory.k[rows]), wide(memory.v[rows]))
    return out


def dense_attention(q: Array, memory: Memory, queries: Queries) -> Array:
    out = np.zeros_like(q)
    for t, (position, sequence) in enumerate(zip(queries.positions, queries.sequence, strict=True)):
        rows = physical_rows(queries, sequence, np.arange(position + 1))
        out[t] = attend(q[t], wide(memory.k[rows]), wide(memory.v[rows]))
    return out


def sliding_attention(q: Array, k: Array, v: Array, window: Window, queries: Queries) -> Array:
    out = np.zeros_like(q)
    for b, (start, stop) in enumerate(zip(queries.cu_seqlens, queries.cu_seqlens[1:], strict=False)):
        first = queries.positions[start]  # of this chunk; everything before it is in the ring
        for t in range(start, stop):
            position = queries.positions[t]
            if position < 0:
                continue
            oldest = max(0, position - window.size + 1)
            ring = queries.window_slots[b] * window.size + np.arange(oldest, first) % window.size
            chunk = np.arange(start + max(0, oldest - first), t + 1)
            seen_k = np.concatenate([window.k[ring], k[chunk]])
            seen_v = np.concatenate([window.v[ring], v[chunk]])
            out[t] = attend(q[t], seen_k, seen_v)
    return out


def attend_window(
    q: Array, k: Array, v: Array, norms: HeadNorms, window: Window, queries: Queries, ring_mapping: Array
) -> tuple[Array, Window]:
    q = norm_rope(q, norms.q, norms.eps, queries.positions, norms.theta)
    k = norm_rope(k, norms.k, norms.eps, queries.positions, norms.theta)
    return sliding_attention(q, k, v, window, queries), write_window(window, k, v, ring_mapping)


# -- sampling ----------------------------------------------------------------------------------------------


def threefry2x32(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): uint32 words in, two uint32 words out."""
    with np.errstate(over="ignore"):
        words = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
        x, y = counter[0] + words[0], counter[1] + words[1]
        for step in range(5):
            for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[step % 2]:
                x = x + y
                y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
                y = y ^ x
            x = x + words[(step + 1) % 3]
            y = y + words[(step + 2) % 3] + np.uint32(step + 1)
    return x, y


def gumbel(seed: Array, positions: Array, vocab_size: int) -> Array:
    """Noise that depends on (seed, position, token id) alone: [R, 2], [R] -> [R, V]."""
    key = (seed[:, :1].astype(np.uint32), seed[:, 1:].astype(np.uint32))
    counter = (positions[:, None].astype(np.uint32), np.arange(vocab_size, dtype=np.uint32)[None])
    bits, _ = threefry2x32(key, counter)
    uniform = ((bits >> np.uint32(9)).astype(np.float64) + 0.5) * 2.0**-23  # 23 bits, never 0 or 1
    return -np.log(-np.log(uniform))


def penalize(logits: Array, penalty: float, tokens: Array) -> Array:
    """Positive logits of seen tokens are divided, negative ones multiplied: [V], [n] -> [V]."""
    seen = np.zeros(len(logits), bool)
    seen[tokens[tokens >= 0]] = True
    penalized = np.where(logits > 0, logits / penalty, logits * penalty)
    return np.where(seen, penalized, logits)


def filter_logits(logits: Array, top_k: int, top_p: float, min_p: float) -> Array:
    """To -inf what min-p, then top-k, then top-p leave out; ties with the last one kept stay: [V] -> [V]."""
    if min_p > 0:
        logits = np.where(logits >= logits.max() + np.log(min_p), logits, -np.inf)
    descending = np.sort(logits)[::-1]
    if 0 < top_k < len(logits):
        logits = np.where(logits >= descending[top_k - 1], logits, -np.inf)
        descending = np.sort(logits)[::-1]
    if top_p < 1:
        probabilities = np.exp(descending - descending[0])
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities
        last_kept = descending[before < top_p][-1]
        logits = np.where(logits >= last_kept, logits, -np.inf)
    return logits


def sample(logits: Array, sampling: SamplingBatch) -> Sampled:
    num_rows, vocab_size = logits.shape
    noise = gumbel(sampling.seed, sampling.positions, vocab_size)
    tokens = np.full(num_rows, -1, np.int32)
    for r in range(num_rows):
        if np.isnan(logits[r]).any() or not np.isfinite(logits[r].max()):
            continue
        z = logits[r]
        if sampling.penalty_tokens is not None:
            z = penalize(z, sampling.repetition_penalty[r], sampling.penalty_tokens[r])
        if sampling.temperature[r] > 0:
            z = z / sampling.temperature[r]
            z = filter_logits(z, sampling.top_k[r], sampling.top_p[r], sampling.min_p[r]) + noise[r]
        tokens[r] = np.argmax(z)
    if sampling.num_logprobs is None:
        return Sampled(tokens, None, None, None)
    shifted = logits - logits.max(axis=1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    top = np.argsort(-logprobs, axis=1, kind="stable")[:, : sampling.num_logprobs].astype(np.int32)
    chosen = np.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    return Sampled(tokens, chosen, top, np.take_along_axis(logprobs, top, axis=1))


# -- training ----------------------------------------------------------------------------------------------


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def teacher(q: Array, k: Array) -> Array:
    """Dense causal attention, mean of layers and heads (equation 5): [L, n, H, D], [L, n, G, D] -> [n, n]."""
    length, num_heads, head_dim = q.shape[1:]
    k = np.repeat(k, num_heads // k.shape[2], axis=2)
    scores = np.einsum("lthd,lshd->lhts", q, k) / np.sqrt(head_dim)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    return softmax(scores).mean(axis=(0, 1))


def index_kd_loss(q_idx: Array, k_idx: Array, q: Array, k: Array) -> float:
    """Mean over positions of KL(teacher || softmax(q_idx . k_idx / sqrt(I))), causal (equations 5-6).

    Shapes: [n, I], [n, I], [L, n, H, D], [L, n, G, D]. The teacher carries no gradient.
    """
    length, index_dim = q_idx.shape
    target = teacher(q, k)
    scores = np.where(np.tril(np.ones((length, length), bool)), q_idx @ k_idx.T / np.sqrt(index_dim), -np.inf)
    student = softmax(scores)
    ratio = np.log(np.where(target > 0, target, 1.0)) - np.log(np.where(target > 0, student, 1.0))
    return float((target * ratio).sum(axis=-1).mean())


# -- the backend "numpy" -----------------------------------------------------------------------------------


class _NumpyBackend:
    name = name

    def devices(self) -> list[Device]:
        return [Device("cpu", "cpu", True, "NumPy float64: exact and slow, the specification of every op")]

    def open(self, device: str | None = None) -> Ops:
        if device not in (None, "cpu"):
            raise BackendError(f"backend 'numpy' runs on device 'cpu' only, got {device!r}")
        return typing_cast(Ops, sys.modules[__name__])


backend = _NumpyBackend()
