"""The kernels over memories in float8 E4M3, which MLX keeps as bytes: every byte is the number that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.float8 import FLOAT8
from clsa.ops import Selection
from tests.metal.kernels import SPEC, check_soundness, mlx_ops, run, run_everywhere
from tests.metal.test_gather_attention import NUM_ROWS, ragged_rows, selection_of
from tests.metal.test_select import STEP
from tests.ops.cases import Layout, host, layout, normal, poisoned, rounded
from tests.ops.routing import arrays
from tests.ops.test_float8 import INDEX, KV, filled
from tests.tolerance import assert_close, assert_equal

pytestmark = pytest.mark.mlx

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])


def attention(q: np.ndarray, kv: list[np.ndarray], rows: np.ndarray, dtype: str) -> Callable[[], Any]:
    ops = mlx_ops()
    from clsa_mlx.kernels.gather_attention import gather_attention

    memory = filled(ops, kv[0], kv[1], kv[0][:, 0], dtype, KV)
    return lambda: gather_attention(ops.asarray(q), memory, selection_of(ops, rows))


def attention_case(heads: int, kv_heads: int, head_dim: int, k: int, dtype: str) -> tuple[Any, ...]:
    """Queries, K and V with NaN in every row that must not be read, and rows."""
    rng = np.random.default_rng(head_dim)
    rows = ragged_rows(rng, k)
    read = np.zeros(NUM_ROWS, bool)
    read[rows[rows >= 0]] = True
    q = normal(rng, len(rows), heads, head_dim, dtype=dtype, scale=2.0)
    kv = [poisoned(normal(rng, NUM_ROWS, kv_heads, head_dim, dtype=dtype), read) for _ in "kv"]
    return q, kv, rows


@DTYPES
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, k", [(4, 2, 64, 38), (3, 1, 80, 33), (5, 1, 128, 256), (2, 2, 8, 5), (3, 1, 256, 20)]
)
def test_gather_attention(dtype: str, heads: int, kv_heads: int, head_dim: int, k: int) -> None:
    """Each number of elements that a lane holds, in one part and in several."""
    ops = mlx_ops()
    q, kv, rows = attention_case(heads, kv_heads, head_dim, k, dtype)
    memory = filled(SPEC, kv[0], kv[1], kv[0][:, 0], dtype, KV)
    want = spec.gather_attention(spec.asarray(q), memory, selection_of(SPEC, rows))
    for how, got in run_everywhere(attention(q, kv, rows, dtype)):
        assert_close("gather_attention", dtype, host(ops, got, dtype), want, (heads, kv_heads, head_dim, k, how))


def test_every_byte() -> None:
    """A query that sees one row gets that row: V holds all bytes, and -0 is 0 after the sum."""
    values = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32).reshape(32, 1, 8)
    rows = np.arange(32, dtype=np.int32)[:, None]
    got = run(attention(np.ones((32, 1, 8), np.float32), [np.zeros_like(values), values], rows, "float32"))
    np.testing.assert_array_equal(np.array(got), values)


def selecting(step: Layout, q: np.ndarray, k_idx: np.ndarray, dtype: str, k: int) -> Callable[[], Selection]:
    ops = mlx_ops()
    from clsa_mlx.kernels.select import select

    kv = rounded(np.zeros((step.num_rows, 1, 8)), dtype)
    memory = filled(ops, kv, kv, k_idx, dtype, INDEX)
    return lambda: select(ops.asarray(q), memory, step.queries(ops), k)


@DTYPES
@pytest.mark.parametrize("index_dim, k", [(16, 65), (65, 512)])
def test_select(dtype: str, index_dim: int, k: int) -> None:
    """Products of small integers and E4M3 numbers: every score is exact in float32."""
    rng = np.random.default_rng(0)
    step = layout(rng, STEP)
    q = rounded(rng.integers(-2, 3, (len(step.positions), index_dim)), dtype)
    k_idx = poisoned(normal(rng, step.num_rows, index_dim, dtype=dtype), step.readable)
    kv = rounded(np.zeros((step.num_rows, 1, 8)), dtype)
    memory = filled(SPEC, kv, kv, k_idx, dtype, INDEX)
    want = arrays(SPEC, spec.select(spec.asarray(q), memory, step.queries(SPEC), k, 1))
    got = arrays(mlx_ops(), run(selecting(step, q, k_idx, dtype, k)))
    for name, a, b in zip(("positions", "rows", "lengths"), got, want):
        assert_equal(f"select {name}", a, b, (dtype, index_dim, k))


def test_types_and_races() -> None:
    rng = np.random.default_rng(3)
    q, kv, rows = attention_case(2, 1, 64, 256, "bfloat16")
    step = layout(rng, STEP[:6])
    k_idx = normal(rng, step.num_rows, 64, dtype="float16")
    index = normal(rng, len(step.positions), 64, dtype="float16")
    missing = check_soundness(attention(q[1:2], kv, rows[1:2], "bfloat16"), launches=2)
    missing += check_soundness(selecting(step, index, k_idx, "float16", 40), launches=4)
    if missing:
        pytest.skip("; ".join(missing))


def test_keys_of_bytes_have_a_kernel() -> None:
    import mlx.core as mx

    from clsa_mlx.kernels.attend import has_kernel

    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        assert has_kernel(mx.zeros((1, 2, 64), dtype), mx.zeros((4, 1, 64), mx.uint8))
    assert not has_kernel(mx.zeros((1, 2, 100)), mx.zeros((4, 1, 100), mx.uint8))
