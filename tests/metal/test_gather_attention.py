"""The kernel of gather_attention against the specification, for every head dim, dtype and group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops, Selection
from tests.metal.kernels import SPEC, calls_of, check_soundness, mlx_ops, run, run_everywhere
from tests.ops.cases import filled_memory, host, normal, poisoned, rounded
from tests.tolerance import assert_close

pytestmark = pytest.mark.mlx

NUM_ROWS = 448
DTYPES = ("float32", "float16", "bfloat16")
# Every head dim in every dtype, with each of the groups 1 to 8 among them, and more heads than registers allow.
SHAPES = [
    (heads, kv_heads, head_dim, dtype)
    for (heads, kv_heads, head_dim), dtypes in {
        (4, 1, 64): DTYPES,
        (3, 3, 80): DTYPES,
        (4, 2, 96): DTYPES,
        (5, 1, 128): DTYPES,
        (8, 1, 256): DTYPES,
        (3, 1, 64): ("float32",),
        (12, 2, 128): ("bfloat16",),
        (7, 1, 256): ("float16",),
        (24, 2, 128): ("float16",),
        (2, 1, 8): ("float32",),
        (2, 1, 192): ("float32",),
    }.items()
    for dtype in dtypes
]


def ragged_rows(rng: np.random.Generator, k: int) -> np.ndarray:
    """Rows [4, k], -1 padded: none, all k, one, some."""
    rows = np.full((4, k), -1, np.int32)
    for t, length in enumerate((0, k, 1, k // 2)):
        rows[t, :length] = rng.permutation(NUM_ROWS)[:length]
    return rows


def launcher(q: np.ndarray, kv: list[np.ndarray], rows: np.ndarray, dtype: str, **options: Any) -> Callable[[], Any]:
    ops = mlx_ops()
    from clsa_mlx.kernels.gather_attention import gather_attention

    memory = filled_memory(ops, kv[0], kv[1], None, dtype)
    return lambda: gather_attention(ops.asarray(q), memory, selection_of(ops, rows), **options)


def selection_of(ops: Ops, rows: np.ndarray) -> Selection:
    lengths = (rows >= 0).sum(1).astype(np.int32)
    return Selection(ops.asarray(rows), ops.asarray(rows), ops.asarray(lengths))


def case(
    rng: np.random.Generator, rows: np.ndarray, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Queries, K and V with NaN in every row that must not be read, and what the specification says."""
    read = np.zeros(NUM_ROWS, bool)
    read[rows[rows >= 0]] = True
    q = normal(rng, len(rows), heads, head_dim, dtype=dtype, scale=2.0)
    kv = [poisoned(normal(rng, NUM_ROWS, kv_heads, head_dim, dtype=dtype), read) for _ in "kv"]
    memory = filled_memory(SPEC, kv[0], kv[1], None, dtype)
    return q, kv, spec.gather_attention(spec.asarray(q), memory, selection_of(SPEC, rows))


def assert_attends(rows: np.ndarray, heads: int, kv_heads: int, head_dim: int, dtype: str, **options: Any) -> None:
    ops = mlx_ops()
    q, kv, want = case(np.random.default_rng(head_dim), rows, heads, kv_heads, head_dim, dtype)
    for how, got in run_everywhere(launcher(q, kv, rows, dtype, **options)):
        result = host(ops, got, dtype)
        assert not result[rows[:, 0] < 0].any(), f"{how}: a query that sees nothing must get zeros"
        assert_close("gather_attention", dtype, result, want, (heads, kv_heads, head_dim, options, how))


@pytest.mark.parametrize("heads, kv_heads, head_dim, dtype", SHAPES)
def test_shapes(heads: int, kv_heads: int, head_dim: int, dtype: str) -> None:
    assert_attends(ragged_rows(np.random.default_rng(0), 38), heads, kv_heads, head_dim, dtype)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 255])
def test_lengths(k: int) -> None:
    assert_attends(ragged_rows(np.random.default_rng(k), k), 2, 1, 64, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [256, 397])
def test_selections_in_parts(k: int, dtype: str) -> None:
    rows = ragged_rows(np.random.default_rng(k), k)
    assert_attends(rows, 2, 1, 64, dtype)
    q, kv, _ = case(np.random.default_rng(0), rows, 2, 1, 64, dtype)
    names = [call.source.kernel.name for call in calls_of(launcher(q, kv, rows, dtype))]
    assert names == ["clsa_gather_attention", "clsa_combine"]


@pytest.mark.parametrize("threads, head_dim", [(512, 256), (512, 80), (1024, 128)])
def test_larger_threadgroups(threads: int, head_dim: int) -> None:
    assert_attends(ragged_rows(np.random.default_rng(1), 150), 2, 1, head_dim, "float32", threads=threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: str) -> None:
    """Scores of +-50000: the softmax has to subtract the maximum, in float32."""
    ops = mlx_ops()
    q = rounded(np.full((1, 1, 8), 200.0), dtype)
    k = np.array([[[100.0] * 8], [[-100.0] * 8], [[99.0] * 8]])
    v = np.arange(24).reshape(3, 1, 8)
    kv = [rounded(x, dtype) for x in (k, v)]
    got = run(launcher(q, kv, np.array([[0, 1, 2]], np.int32), dtype))
    assert host(ops, got, dtype)[0, 0].tolist() == list(range(8))


def test_infinite_scores() -> None:
    """-inf weighs nothing, NaN spoils its own query and head and nothing else."""
    rng = np.random.default_rng(2)
    q = np.ones((3, 2, 8), np.float32)
    k, v = rng.standard_normal((2, NUM_ROWS, 2, 8)).astype(np.float32)
    k[10, :, 0], k[11, 1, 0] = -np.inf, np.nan
    rows = np.array([[9, 10, 12], [10, 12, 9], [9, 11, 12]], np.int32)
    got = np.array(run(launcher(q, [k, v], rows, "float32")))
    for t in range(2):
        seen = rows[t][rows[t] != 10]
        np.testing.assert_allclose(got[t], spec.attend(q[t], k[seen], v[seen]), rtol=1e-5)
    assert np.isfinite(got[2, 0]).all() and np.isnan(got[2, 1]).all()


def test_only_scores_of_minus_infinity_give_zeros() -> None:
    k, v = np.full((4, 1, 8), -np.inf, np.float32), np.ones((4, 1, 8), np.float32)
    got = run(launcher(np.ones((1, 1, 8), np.float32), [k, v], np.array([[0, 2, -1]], np.int32), "float32"))
    assert not np.array(got).any()


def test_types_and_races() -> None:
    rows = ragged_rows(np.random.default_rng(3), 256)[1:2]
    q, kv, _ = case(np.random.default_rng(3), rows, 2, 1, 64, "bfloat16")
    if missing := check_soundness(launcher(q, kv, rows, "bfloat16"), launches=2):
        pytest.skip("; ".join(missing))


@pytest.mark.parametrize("head_dim, threads", [(64, 1024), (128, 1024), (256, 256), (256, 512)])
def test_threadgroup_memory(head_dim: int, threads: int) -> None:
    from clsa_mlx.kernels.attend import Launch

    launch = Launch(1, 8, 1, head_dim, 100, threads)
    simds = threads // 32
    assert 4 * simds * (2 * launch.block_heads + head_dim) <= 18 << 10


def test_what_has_a_kernel() -> None:
    import mlx.core as mx

    from clsa_mlx.kernels.attend import has_kernel

    def answer(head_dim: int, q_dtype: mx.Dtype = mx.float16) -> bool:
        return has_kernel(mx.zeros((1, 2, head_dim), q_dtype), mx.zeros((4, 1, head_dim), mx.float16))

    assert all(map(answer, (8, 64, 80, 96, 128, 256)))
    assert not any(map(answer, (4, 10, 100, 257, 264, 512)))
    assert not answer(64, mx.float32)
