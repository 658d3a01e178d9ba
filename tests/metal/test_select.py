"""The kernels of select against the specification: exact, whatever the scores, the lengths and the pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Memory, Ops, Selection
from tests.metal.harness import Kernel, check, prepare
from tests.metal.kernels import SPEC, calls_of, check_soundness, mlx_ops, run, run_everywhere
from tests.ops.cases import Chunk, Layout, filled_memory, layout, normal, poisoned, rounded
from tests.ops.routing import Arrays, arrays, assert_best, assert_form
from tests.ops.test_select import SPECIAL
from tests.tolerance import SCORE_ERROR, assert_equal

pytestmark = pytest.mark.mlx

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
# Around pages of 64, threadgroups of 512 scores, blocks of 1024 keys; and none at all.
LENGTHS = (1, 2, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 2000)
STEP = [Chunk(n - 1, 1) for n in LENGTHS] + [Chunk(0, 0, padded=1)]


def launcher(
    step: Layout, q_idx: np.ndarray, k_idx: np.ndarray, dtype: str, k: int, **options: Any
) -> Callable[[], Selection]:
    ops = mlx_ops()
    from clsa_mlx.kernels.select import select

    memory = memory_of(ops, k_idx, dtype)
    return lambda: select(ops.asarray(q_idx), memory, step.queries(ops), k, **options)


def memory_of(ops: Ops, k_idx: np.ndarray, dtype: str) -> Memory:
    kv = rounded(np.zeros((len(k_idx), 1, 2)), dtype)
    return filled_memory(ops, kv, kv, k_idx, dtype)


def assert_selects(step: Layout, q_idx: np.ndarray, k_idx: np.ndarray, dtype: str, k: int, **options: Any) -> None:
    """The same as the specification, in every order and with both placements."""
    ops = mlx_ops()
    memory = memory_of(SPEC, k_idx, dtype)
    want = arrays(SPEC, spec.select(spec.asarray(q_idx), memory, step.queries(SPEC), k, 1))
    for how, got in run_everywhere(launcher(step, q_idx, k_idx, dtype, k, **options)):
        for name, a, b in zip(("positions", "rows", "lengths"), arrays(ops, got), want):
            assert_equal(f"select {name}", a, b, (dtype, k, options, how))


def integers(rng: np.random.Generator, *shape: int, dtype: str) -> np.ndarray:
    """Scores of these are exact in every dtype, and most of them are shared by many positions."""
    return rounded(rng.integers(-2, 3, shape), dtype)


@DTYPES
@pytest.mark.parametrize("k", [1, 63, 64, 65, 512, 1024, 1999])
def test_lengths_and_ties(dtype: str, k: int) -> None:
    rng = np.random.default_rng(k)
    step = layout(rng, STEP)
    k_idx = poisoned(integers(rng, step.num_rows, 16, dtype=dtype), step.readable)
    assert_selects(step, integers(rng, len(STEP), 16, dtype=dtype), k_idx, dtype, k)


@pytest.mark.parametrize("threads", [512, 1024])
@pytest.mark.parametrize("k", [1, 65, 1024])
def test_larger_threadgroups(threads: int, k: int) -> None:
    rng = np.random.default_rng(k)
    step = layout(rng, [*STEP, Chunk(4500, 1)])
    k_idx = poisoned(integers(rng, step.num_rows, 8, dtype="float32"), step.readable)
    assert_selects(step, integers(rng, len(STEP) + 1, 8, dtype="float32"), k_idx, "float32", k, threads=threads)


@DTYPES
@pytest.mark.parametrize("index_dim", [1, 4, 65, 128, 200])
def test_index_dims(dtype: str, index_dim: int) -> None:
    rng = np.random.default_rng(index_dim)
    step = layout(rng, [Chunk(n - 1, 1) for n in (300, 64, 1)])
    k_idx = poisoned(integers(rng, step.num_rows, index_dim, dtype=dtype), step.readable)
    assert_selects(step, integers(rng, 3, index_dim, dtype=dtype), k_idx, dtype, 48)


SCORES = SPECIAL | {
    "one-top-digit": lambda rng, n: 1.0 + rng.integers(0, 2**20, n) * 2.0**-23,
    "two-digits-shared": lambda rng, n: 1.0 + rng.integers(0, 2**7, n) * 2.0**-23,
    "subnormal": lambda rng, n: rng.integers(-4, 5, n) * 2.0**-149,
    "all-magnitudes": lambda rng, n: np.ldexp(rng.choice([-1.0, 1.0], n), rng.integers(-140, 127, n)),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES.keys())
@pytest.mark.parametrize("k", [1, 100, 1030])
def test_special_scores(scores: Any, k: int) -> None:
    """The index has one dimension, so that a score is the key itself."""
    rng = np.random.default_rng(k)
    step = layout(rng, [Chunk(n - 1, 1) for n in (1100, 99, 100, 101, 1)])
    k_idx = poisoned(rounded(scores(rng, step.num_rows)[:, None], "float32"), step.readable)
    assert_selects(step, np.ones((5, 1), np.float32), k_idx, "float32", k)


def test_keys_ascend_with_scores() -> None:
    """NaN like -inf, -0 like +0, and no key is 0, which marks what a query does not see."""
    from clsa_mlx.kernels.load import _text

    ascending = np.array([-np.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, np.inf], np.float32)
    scores = np.concatenate([ascending, [np.nan, -np.nan, -0.0]]).astype(np.float32)
    bits = scores.view(np.uint32).astype(np.int64)
    expected = np.where(bits >> 31, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    expected[-3:] = expected[0], expected[0], expected[4]
    assert (np.diff(expected[: len(ascending)]) > 0).all() and expected.min() > 0
    body = "uint i = thread_position_in_grid.x; keys[i] = score_key(scores[i]);"
    kernel = Kernel("keys", ["scores"], ["keys"], body, _text("digits.h.metal"))
    call = prepare(
        kernel,
        [scores],
        grid=(scores.size, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[scores.shape],
        output_dtypes=[np.uint32],
    )
    check(call, expected)


def test_nan_and_infinite_elements_in_wide_keys() -> None:
    rng = np.random.default_rng(3)
    step = layout(rng, STEP)
    k_idx = integers(rng, step.num_rows, 16, dtype="bfloat16")
    rows = rng.permutation(step.num_rows)[:300]
    k_idx[rows, rng.integers(0, 16, 300)] = rng.choice([np.nan, np.inf, -np.inf], 300)
    q_idx = rounded(rng.choice([-1, 1], (len(STEP), 16)), "bfloat16")
    assert_selects(step, q_idx, k_idx, "bfloat16", 32)


@DTYPES
def test_real_scores(dtype: str) -> None:
    ops = mlx_ops()
    rng = np.random.default_rng(4)
    step = layout(rng, [Chunk(1499, 1), Chunk(777, 1)])
    q_idx, k_idx = normal(rng, 2, 128, dtype=dtype), normal(rng, step.num_rows, 128, dtype=dtype)
    got: Arrays = arrays(ops, run(launcher(step, q_idx, k_idx, dtype, 256)))
    assert_form(dtype, step, got, 256, 1)
    for t, (last, sequence) in enumerate(zip(step.positions, step.sequence)):
        keys = k_idx[step.rows_of(sequence, np.arange(last + 1))].astype(np.float64)
        query = q_idx[t].astype(np.float64)
        slack = SCORE_ERROR[dtype] * np.linalg.norm(query) * np.linalg.norm(keys, axis=1).max()
        assert_best((dtype, t), got[0][t], keys @ query, 256, 1, slack)


@pytest.mark.parametrize("length, k", [(70_001, 2048), (1 << 20, 8192)])
def test_long_texts(length: int, k: int) -> None:
    ops = mlx_ops()
    rng = np.random.default_rng(length)
    step = layout(rng, [Chunk(length - 1, 1)])
    k_idx = rounded(np.round(rng.standard_normal((step.num_rows, 1)), 3), "float32")
    q_idx = np.ones((1, 1), np.float32)
    want = arrays(SPEC, spec.select(spec.asarray(q_idx), memory_of(SPEC, k_idx, "float32"), step.queries(SPEC), k, 1))
    got = arrays(ops, run(launcher(step, q_idx, k_idx, "float32", k)))
    for name, a, b in zip(("positions", "rows", "lengths"), got, want):
        assert_equal(f"select {name}", a, b, (length, k))


def test_types_and_races() -> None:
    rng = np.random.default_rng(5)
    step = layout(rng, [Chunk(n - 1, 1) for n in (1030, 7)])
    k_idx = integers(rng, step.num_rows, 8, dtype="bfloat16")
    missing = check_soundness(launcher(step, integers(rng, 2, 8, dtype="bfloat16"), k_idx, "bfloat16", 9), launches=4)
    if missing:
        pytest.skip("; ".join(missing))


def test_a_single_short_query_has_inputs_in_constant_memory() -> None:
    """MLX passes inputs of fewer than 8 elements in another address space, and one query has many of those."""
    rng = np.random.default_rng(6)
    step = layout(rng, [Chunk(69, 1)])
    k_idx = integers(rng, step.num_rows, 1, dtype="float32")
    compute = launcher(step, np.ones((1, 1), np.float32), k_idx, "float32", 5)
    spaces = {p.name: p.type.split()[1] for call in calls_of(compute) for p in call.source.parameters}
    assert {spaces[name] for name in ("query", "positions", "block_table", "threshold", "counts")} == {"constant"}
    if missing := check_soundness(compute, launches=4):
        pytest.skip("; ".join(missing))
