"""Small kernels that use what the project's kernels use, with their specifications in NumPy.

They show that the harness runs right kernels right; `test_planted_bugs.py` breaks them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from tests.metal.harness import Call, Kernel, prepare

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
U32, I32 = np.dtype(np.uint32), np.dtype(np.int32)


def normal(shape: Any, dtype: np.dtype = F32, seed: int = 0) -> np.ndarray:
    """Normal random numbers, the same for the same seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def launch(
    kernel: Kernel, inputs: Sequence[Any], threads: int, group: int, shape: Any, dtype: Any, **template: Any
) -> Call:
    """A call with a grid of one dimension and one output."""
    return prepare(
        kernel,
        inputs,
        template=list(template.items()),
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )


# ---- c = a + scale * b, one thread per element

ADD = Kernel(
    name="add",
    input_names=["a", "b", "scale"],
    output_names=["c"],
    source="""
    uint i = thread_position_in_grid.x;
    c[i] = T(float(a[i]) + scale * float(b[i]));
""",
)


def add(n: int = 1000, dtype: np.dtype = F32, threads: int = 256, kernel: Kernel = ADD) -> tuple[Call, np.ndarray]:
    a, b = normal(n, dtype), normal(n, dtype, seed=1)
    call = launch(kernel, [a, b, 0.5], n, threads, (n,), dtype, T=dtype)
    return call, a.astype(np.float64) + 0.5 * b.astype(np.float64)


# ---- scores = keys @ query, one simdgroup per key

SCORE = Kernel(
    name="score",
    input_names=["keys", "query"],
    output_names=["scores"],
    header="""
template <typename T>
METAL_FUNC float4 load4(const device T* p, uint i) {
  return float4(((const device vec<T, 4>*)p)[i]);
}
""",
    source="""
    uint row = thread_position_in_grid.x / 32;
    uint lane = thread_index_in_simdgroup;
    const device T* key = keys + row * D;
    float sum = 0;
    for (uint i = lane; i < D / 4; i += 32) {
      sum += dot(load4(key, i), load4(query, i));
    }
    sum = simd_sum(sum);
    if (lane == 0) {
      scores[row] = sum;
    }
""",
)


def score(
    n: int = 100, d: int = 128, dtype: np.dtype = F16, threads: int = 256, kernel: Kernel = SCORE
) -> tuple[Call, np.ndarray]:
    keys, query = normal((n, d), dtype), normal(d, dtype, seed=1)
    call = launch(kernel, [keys, query], 32 * n, threads, (n,), F32, T=dtype, D=d)
    return call, keys.astype(np.float64) @ query.astype(np.float64)


# ---- exact top-k without a sort: one threadgroup finds the k-th largest key byte by byte, then collects in order

TOPK = Kernel(
    name="topk",
    input_names=["scores"],
    output_names=["indices"],
    header="""
// Larger floats become larger integers.
METAL_FUNC uint sortable(float x) {
  uint bits = as_type<uint>(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
""",
    source="""
    threadgroup atomic_uint histogram[256];
    threadgroup uint totals[32];
    threadgroup uint chosen[2];  // the bucket of the k-th largest, and how many of it are wanted

    uint me = thread_index_in_threadgroup;
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    uint prefix = 0, wanted = K;

    for (int shift = 24; shift >= 0; shift -= 8) {
      for (uint i = me; i < 256; i += THREADS) {
        atomic_store_explicit(&histogram[i], 0, memory_order_relaxed);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint i = me; i < N; i += THREADS) {
        uint key = sortable(scores[i]);
        if (shift == 24 || key >> (shift + 8) == prefix) {
          atomic_fetch_add_explicit(&histogram[key >> shift & 255], 1, memory_order_relaxed);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (group == 0) {
        // Lane i owns the buckets 255 - 8 i and the seven below it: largest first.
        uint mine = 0;
        for (uint j = 0; j < 8; ++j) {
          mine += atomic_load_explicit(&histogram[255 - 8 * lane - j], memory_order_relaxed);
        }
        uint above = simd_prefix_exclusive_sum(mine);
        if (above < wanted && wanted <= above + mine) {
          uint bucket = 255 - 8 * lane;
          for (uint count = 0;; --bucket) {
            count = atomic_load_explicit(&histogram[bucket], memory_order_relaxed);
            if (wanted <= above + count) break;
            above += count;
          }
          chosen[0] = bucket;
          chosen[1] = wanted - above;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      prefix = prefix << 8 | chosen[0];
      wanted = chosen[1];
    }

    // Indices ascend: all keys above the k-th largest, and of the equal ones the first `wanted`.
    uint done_above = 0, done_equal = 0;
    for (uint start = 0; start < N; start += THREADS) {
      uint i = start + me;
      uint key = i < N ? sortable(scores[i]) : 0;
      bool above = i < N && key > prefix, equal = i < N && key == prefix;
      uint mine = above ? 1u << 16 : equal ? 1u : 0u;
      uint before = simd_prefix_exclusive_sum(mine);
      if (lane == 31) {
        totals[group] = before + mine;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint total = lane < THREADS / 32 ? totals[lane] : 0;
      uint sums = simd_prefix_exclusive_sum(total);
      before += simd_shuffle(sums, group);
      uint all = simd_sum(total);
      uint above_before = done_above + (before >> 16), equal_before = done_equal + (before & 0xffff);
      if (above || (equal && equal_before < wanted)) {
        indices[above_before + min(equal_before, wanted)] = i;
      }
      done_above += all >> 16;
      done_equal += all & 0xffff;
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
""",
)


def topk(scores: np.ndarray, k: int, threads: int = 1024, kernel: Kernel = TOPK) -> tuple[Call, np.ndarray]:
    call = launch(kernel, [scores], threads, threads, (k,), U32, N=scores.size, K=k, THREADS=threads)
    return call, np.sort(np.argsort(-scores.astype(np.float64), kind="stable")[:k])


# ---- attention of a group of query heads over gathered rows: simdgroups share the rows, then combine

ATTENTION = Kernel(
    name="attention",
    input_names=["queries", "keys", "values", "rows", "scale"],
    output_names=["out"],
    source="""
    // One threadgroup per kv head. Lane i of a simdgroup holds the elements i, i + 32, ... of the head dim.
    constexpr uint PER_LANE = D / 32, SIMDGROUPS = THREADS / 32;
    threadgroup float partial[SIMDGROUPS * D];
    threadgroup float maxima[SIMDGROUPS], sums[SIMDGROUPS];

    uint head = threadgroup_position_in_grid.x, lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;

    for (uint g = 0; g < GROUP; ++g) {
      const device T* query = queries + (head * GROUP + g) * D;
      float q[PER_LANE], sum[PER_LANE];
      for (uint j = 0; j < PER_LANE; ++j) {
        q[j] = float(query[lane + 32 * j]) * scale;
        sum[j] = 0;
      }
      float top = -INFINITY, total = 0;
      for (uint i = group; i < ROWS; i += SIMDGROUPS) {
        if (rows[i] < 0) continue;
        size_t row = (size_t(rows[i]) * HEADS + head) * D;
        float s = 0;
        for (uint j = 0; j < PER_LANE; ++j) s += q[j] * float(keys[row + lane + 32 * j]);
        s = simd_sum(s);
        float next = max(top, s), weight = fast::exp(s - next), keep = fast::exp(top - next);
        for (uint j = 0; j < PER_LANE; ++j) {
          sum[j] = sum[j] * keep + weight * float(values[row + lane + 32 * j]);
        }
        total = total * keep + weight;
        top = next;
      }
      for (uint j = 0; j < PER_LANE; ++j) partial[group * D + lane + 32 * j] = sum[j];
      if (lane == 0) {
        maxima[group] = top;
        sums[group] = total;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      float best = -INFINITY;
      for (uint s = 0; s < SIMDGROUPS; ++s) best = max(best, maxima[s]);
      for (uint d = thread_index_in_threadgroup; d < D; d += THREADS) {
        float x = 0, norm = 0;
        for (uint s = 0; s < SIMDGROUPS; ++s) {
          float w = maxima[s] == -INFINITY ? 0.0f : fast::exp(maxima[s] - best);
          x += w * partial[s * D + d];
          norm += w * sums[s];
        }
        out[(head * GROUP + g) * D + d] = T(norm > 0.0f ? x / norm : 0.0f);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
""",
)


def attention(
    rows: np.ndarray,
    heads: int = 2,
    group: int = 3,
    d: int = 64,
    dtype: np.dtype = F32,
    threads: int = 128,
    kernel: Kernel = ATTENTION,
) -> tuple[Call, np.ndarray]:
    cached = max(int(rows.max(initial=0)) + 1, 8)
    q, k = normal((heads * group, d), dtype), normal((cached, heads, d), dtype, seed=1)
    v = normal((cached, heads, d), dtype, seed=2)
    inputs = [q, k, v, rows.astype(np.int32), float(d**-0.5)]
    sizes = {"T": dtype, "D": d, "HEADS": heads, "GROUP": group, "ROWS": rows.size, "THREADS": threads}
    call = launch(kernel, inputs, threads * heads, threads, q.shape, dtype, **sizes)
    return call, _attention(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), rows[rows >= 0])


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: np.ndarray) -> np.ndarray:
    group = q.shape[0] // k.shape[1]
    keys, values = np.repeat(k[rows], group, axis=1), np.repeat(v[rows], group, axis=1)
    scores = np.einsum("hd,nhd->hn", q, keys) / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
    total = weights.sum(axis=1, keepdims=True)
    return np.einsum("hn,nhd->hd", weights / np.where(total == 0, 1, total), values)


# ---- the last values of a ring in the order they were written

RING = Kernel(
    name="ring",
    input_names=["ring", "length"],
    output_names=["out"],
    source="""
    uint i = thread_position_in_grid.x;
    uint n = uint(length[0]);
    uint kept = min(n, uint(W));
    out[i] = i < kept ? ring[(n - kept + i) % W] : -1.0f;
""",
)


def ring(length: int, window: int = 10, kernel: Kernel = RING) -> tuple[Call, np.ndarray]:
    values = np.full(window, -2.0, np.float32)
    for position in range(length):
        values[position % window] = position
    call = launch(kernel, [values, np.array([length], np.int32)], window, 32, (window,), F32, W=window)
    last = np.arange(max(0, length - window), length)
    return call, np.concatenate([last, np.full(window - last.size, -1)])
