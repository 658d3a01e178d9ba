"""The kernels over memories in float8 E4M3: written as `clsa.float8` rounds, read as the numbers they stand for.

The interpreter (triton 3.6) rounds to E4M3 wrongly and reads NaN as 480: what needs either runs on the GPU only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.config import MemoryDtypes
from clsa.float8 import FLOAT8, to_float8
from clsa.ops import Ops, Selection
from clsa_cuda.kernels.dense_attention import dense_attention
from clsa_cuda.kernels.gather_attention import compact_attention, compact_rows, gather_attention
from clsa_cuda.kernels.ops import KernelOps
from clsa_cuda.kernels.select import select
from clsa_cuda.kernels.tiles import AttentionTiles, ContextTiles
from clsa_cuda.kernels.write_memory import write_memory
from tests.cuda.conftest import DEVICE
from tests.ops.cases import Chunk, host, layout, normal, poisoned, rounded
from tests.ops.routing import arrays
from tests.ops.test_float8 import BOTH, INDEX, KV, filled, hard_numbers, weight_of
from tests.tolerance import assert_close, assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # log2 of an empty sum, in the interpreter
CHUNKS = [Chunk(n - 1, 1) for n in (150, 1, 64)] + [Chunk(0, 0, padded=1)]


def tiles(splits: int) -> AttentionTiles:
    return AttentionTiles(block_n=16, splits=splits, num_warps=4, num_stages=2)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, splits",
    [(4, 4, 2, 1), (10, 2, 64, 3), (3, 1, 80, 4), (1, 1, 3, 2)],
)
def test_attention(ops: Ops, dtype: str, heads: int, kv_heads: int, head_dim: int, splits: int) -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, CHUNKS)
    q = normal(rng, len(step.positions), heads, head_dim, dtype=dtype, scale=2.0)
    kv = [poisoned(normal(rng, step.num_rows, kv_heads, head_dim, dtype=dtype), step.readable) for _ in range(2)]
    rows = np.full((len(q), 70), -1, np.int32)
    for t, length in enumerate((70, 1, 33, 0)):
        rows[t, :length] = step.rows_of(0, rng.permutation(150)[:length])
    lengths = (rows >= 0).sum(1).astype(np.int32)
    memory, exact = (filled(o, kv[0], kv[1], kv[0][:, 0], dtype, KV) for o in (ops, spec))
    selection, tokens, chosen = Selection(*map(ops.asarray, (rows, rows, lengths))), ops.asarray(q), tiles(splits)
    gathered = spec.gather_attention(spec.asarray(q), exact, Selection(rows, rows, lengths))
    for got, want in (
        (gather_attention(tokens, memory, selection, chosen), gathered),
        (compact_attention(tokens, compact_rows(memory, selection), chosen), gathered),
        (
            dense_attention(tokens, memory, step.queries(ops), ContextTiles(16, 3 * splits - 2, 4, 3)),
            spec.dense_attention(spec.asarray(q), exact, step.queries(spec)),
        ),
    ):
        assert_close("gather_attention", dtype, host(ops, got, dtype), want, (heads, kv_heads, head_dim, splits))


@pytest.mark.parametrize("size", [-126, -20, 0, 15, 100])
def test_queries_of_any_size(ops: Ops, dtype: str, size: int) -> None:
    """They are divided by a power of two on their way to float16, each head by its own; a row of zeros by none."""
    if not np.isfinite(rounded(np.array([1.9]) * 2.0**size, dtype)).all():
        pytest.skip(f"too large for {dtype}")
    rng = np.random.default_rng(1)
    q = rng.standard_normal((2, 3, 32))
    q = q / np.abs(q).max(2, keepdims=True) * np.array([1.9, 2.0**-40, 0.0])[:, None] * 2.0**size
    k, v = (normal(rng, 64, 1, 32, dtype=dtype) for _ in range(2))
    k = rounded(np.where(np.abs(k) < 0.1, 0.0, k) * 2.0 ** min(8, max(-6, -size)), dtype)
    q = rounded(q, dtype)
    rows = np.tile(np.arange(64, dtype=np.int32), (2, 1))
    memory, exact = (filled(o, k, v, k[:, 0], dtype, KV) for o in (ops, spec))
    lengths = np.full(2, 64, np.int32)
    got = gather_attention(ops.asarray(q), memory, Selection(*map(ops.asarray, (rows, rows, lengths))), tiles(2))
    want = spec.gather_attention(spec.asarray(q), exact, Selection(rows, rows, lengths))
    assert_close("gather_attention", dtype, host(ops, got, dtype), want, size)


@pytest.mark.parametrize("index_dim", [16, 65])
def test_select(ops: Ops, dtype: str, index_dim: int) -> None:
    """Products of small integers and E4M3 numbers: every score is exact in float32."""
    rng = np.random.default_rng(0)
    step = layout(rng, [Chunk(n - 1, 1) for n in (700, 1, 65)] + [Chunk(0, 0, padded=1)])
    q = rounded(rng.integers(-2, 3, (len(step.positions), index_dim)), dtype)
    k_idx = poisoned(normal(rng, step.num_rows, index_dim, dtype=dtype), step.readable)
    kv = rounded(np.zeros((step.num_rows, 1, 2)), dtype)
    got, want = (
        arrays(o, choose(o.asarray(q), filled(o, kv, kv, k_idx, dtype, INDEX), step.queries(o), 40, 1))
        for o, choose in ((ops, select), (spec, spec.select))
    )
    for name, a, b in zip(("positions", "rows", "lengths"), got, want):
        assert_equal(f"select {name}", a, b, dtype)


def written(ops: Ops, x: np.ndarray, dtype: str, stored: MemoryDtypes) -> list[np.ndarray]:
    """`x` [n, 8] through the kernel, as K, V and index key of every second row."""
    memory = ops.new_memory(2 * len(x), 2, 4, 8, dtype, stored)
    slots = np.arange(0, 2 * len(x), 2, dtype=np.int32)
    slots[-1] = -1
    k, v, k_idx = (ops.asarray(part) for part in (x.reshape(-1, 2, 4), x[::-1].reshape(-1, 2, 4).copy(), x))
    memory = write_memory(memory, k, v, k_idx, ops.asarray(slots))
    out = []
    for array in (memory.k, memory.v, memory.k_idx):
        got = ops.to_numpy(array).reshape(-1, 8)[: 2 * len(x)]
        assert not got[1::2].any() and not got[2 * len(x) - 2].any(), "written where it does not belong"
        out.append(got[::2][:-1])
    return out


@pytest.mark.parametrize("stored", [BOTH, KV, INDEX], ids=str)
def test_write_of_numbers_that_e4m3_has(ops: Ops, dtype: str, stored: MemoryDtypes) -> None:
    codes = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)
    x = np.nan_to_num(codes, nan=0.0).reshape(-1, 8)
    beyond = rounded(np.where(x == 448, 1000.0, np.where(x == -448, -1000.0, x)), dtype)
    for array, kept, want in zip(
        written(ops, beyond, dtype, stored), (stored.kv, stored.kv, stored.index), (x, x[::-1], x)
    ):
        wide = want if kept else np.where(np.abs(want) == 448, np.copysign(1000.0, want), want)
        np.testing.assert_array_equal(array.astype(np.float32), wide[:-1])


@pytest.mark.cuda
def test_write_rounds(ops: Ops, dtype: str) -> None:
    x = hard_numbers(dtype).reshape(-1, 8)
    for array, want in zip(written(ops, x, dtype, BOTH), (x, x[::-1], x)):
        np.testing.assert_array_equal(array, to_float8(want)[:-1].astype(np.float32))


@pytest.mark.cuda
def test_nan_stays_with_those_who_read_it(ops: Ops) -> None:
    k = np.ones((64, 1, 16), np.float32)
    k[3] = np.nan
    memory = filled(ops, k, k, k[:, 0], "float32", BOTH)
    rows = np.array([[0, 1], [2, 3]], np.int32)
    selection = Selection(*(ops.asarray(x) for x in (rows, rows, np.full(2, 2, np.int32))))
    got = host(ops, gather_attention(ops.asarray(np.ones((2, 1, 16), np.float32)), memory, selection), "float32")
    assert (got[0] == 1).all() and np.isnan(got[1]).all()


def test_products_with_float8_weights(dtype: str) -> None:
    rng = np.random.default_rng(0)
    kernel_ops: Any = KernelOps(DEVICE)
    results: dict[str, Any] = {}
    x, norm, residual = normal(rng, 3, 64, dtype=dtype), normal(rng, 64, dtype=dtype), normal(rng, 3, 32, dtype=dtype)
    weights = [weight_of(rng, 32, 64, dtype) for _ in range(2)]
    for o in (kernel_ops, spec):
        a, b = (o.float8_weight(o.asarray(w)) for w in weights)
        y, n = o.asarray(x), o.asarray(norm)
        results[o.name] = [
            ("quantized", o.linear(y, a)),
            *(("quantized", out) for out in o.linears(y, (a, b))),
            *(("norm_linears", out) for out in o.norm_linears(y, n, 1e-6, (a, b))),
            ("float8_swiglu", o.norm_swiglu(y, n, 1e-6, a, b)),
            ("add_linear", o.add_linear(o.asarray(residual), y, a)),
        ]
    for (op, got), (_, want) in zip(results["cuda"], results["numpy"], strict=True):
        assert_close(op, dtype, host(kernel_ops, got, dtype), want)
