"""select: exact, deterministic, ties to the lower position, NaN as -inf, nothing invisible is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Memory, Ops
from tests.ops.cases import STEPS, Layout, filled_memory, layout, normal, poisoned, rounded
from tests.ops.routing import Arrays, arrays, assert_best, assert_form
from tests.tolerance import SCORE_ERROR, assert_equal

STEP = pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS.keys())
# k smaller than, equal to and larger than the texts of the steps
SIZES = pytest.mark.parametrize(
    "k, block_size", [(1, 1), (64, 1), (111, 1), (2000, 1), (4, 4), (64, 4), (48, 16), (2048, 16)]
)


def memory_of(ops: Ops, k_idx: np.ndarray, dtype: str) -> Memory:
    kv = rounded(np.zeros((len(k_idx), 1, 2)), dtype)
    return filled_memory(ops, kv, kv, k_idx, dtype)


def select_both(
    ops: Ops, step: Layout, q_idx: np.ndarray, k_idx: np.ndarray, dtype: str, k: int, block_size: int
) -> tuple[Arrays, Arrays]:
    """What the backend and what the specification chose."""
    got, want = (
        arrays(o, o.select(o.asarray(q_idx), memory_of(o, k_idx, dtype), step.queries(o), k, block_size))
        for o in (ops, spec)
    )
    return got, want


def assert_same(case: object, got: Arrays, want: Arrays) -> None:
    for name, a, b in zip(("positions", "rows", "lengths"), got, want):
        assert_equal(f"select {name}", a, b, case)


@STEP
@SIZES
def test_exact_scores_with_ties_everywhere(ops: Ops, dtype: str, chunks: list, k: int, block_size: int) -> None:
    """Small integers: every score is exact in every dtype, and most of them are shared by many positions."""
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    q_idx = rounded(rng.integers(-2, 3, (len(step.positions), 16)), dtype)
    k_idx = rounded(rng.integers(-2, 3, (step.num_rows, 16)), dtype)
    case = (dtype, k, block_size)
    got, want = select_both(ops, step, q_idx, poisoned(k_idx, step.readable), dtype, k, block_size)
    assert_form(case, step, got, k, block_size)
    assert_same(case, got, want)


@STEP
@pytest.mark.parametrize("k, block_size, index_dim", [(1, 1, 1), (63, 1, 128), (64, 16, 65), (12, 4, 8)])
def test_real_scores(ops: Ops, dtype: str, chunks: list, k: int, block_size: int, index_dim: int) -> None:
    rng = np.random.default_rng(1)
    step = layout(rng, chunks)
    q_idx = normal(rng, len(step.positions), index_dim, dtype=dtype)
    k_idx = normal(rng, step.num_rows, index_dim, dtype=dtype)
    got, _ = select_both(ops, step, q_idx, poisoned(k_idx, step.readable), dtype, k, block_size)
    case = (dtype, k, block_size, index_dim)
    assert_form(case, step, got, k, block_size)
    for t, (last, sequence) in enumerate(zip(step.positions, step.sequence)):
        keys = k_idx[step.rows_of(sequence, np.arange(last + 1))].astype(np.float64)
        query = q_idx[t].astype(np.float64)
        if last >= 0:
            slack = SCORE_ERROR[dtype] * np.linalg.norm(query) * np.linalg.norm(keys, axis=1).max()
            assert_best((case, t), got[0][t, : got[2][t]], keys @ query, k, block_size, slack)


SPECIAL = {
    "all-nan": lambda rng, n: np.full(n, np.nan),
    "all-minus-inf": lambda rng, n: np.full(n, -np.inf),
    "all-plus-inf": lambda rng, n: np.full(n, np.inf),
    "all-equal": lambda rng, n: np.zeros(n),
    "all-negative": lambda rng, n: -rng.integers(1, 4, n).astype(float),
    "both-signs-of-zero": lambda rng, n: rng.choice([0.0, -0.0], n),
    "everything": lambda rng, n: rng.choice([np.nan, -np.inf, np.inf, -1.0, 0.0, 1.0, 60000.0, -60000.0], n),
    "mostly-nan": lambda rng, n: np.where(rng.random(n) < 0.95, np.nan, 1.0),
    "nan-or-minus-inf": lambda rng, n: rng.choice([np.nan, -np.inf], n),
}


@pytest.mark.parametrize("chunks", [STEPS["decode-ragged"], STEPS["prefill-mixed"]], ids=["decode", "prefill"])
@pytest.mark.parametrize("scores", SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize("k, block_size", [(1, 1), (16, 1), (256, 1), (1200, 1), (16, 4), (96, 16)])
def test_special_scores(ops: Ops, dtype: str, chunks: list, scores: Any, k: int, block_size: int) -> None:
    """The index has one dimension, so that a score is the key itself."""
    rng = np.random.default_rng(2)
    step = layout(rng, chunks)
    k_idx = rounded(scores(rng, step.num_rows)[:, None], dtype)
    q_idx = rounded(np.ones((len(step.positions), 1)), dtype)
    got, want = select_both(ops, step, q_idx, poisoned(k_idx, step.readable), dtype, k, block_size)
    assert_form((dtype, k, block_size), step, got, k, block_size)
    assert_same((dtype, k, block_size), got, want)


def test_nan_and_inf_elements_in_wide_keys(ops: Ops, dtype: str) -> None:
    """One NaN or infinite element spoils the score of its own row and of no other."""
    rng = np.random.default_rng(3)
    step = layout(rng, STEPS["decode-ragged"])
    k_idx = rounded(rng.integers(-2, 3, (step.num_rows, 64)), dtype)
    rows = rng.permutation(step.num_rows)[:200]
    k_idx[rows, rng.integers(0, 64, 200)] = rng.choice([np.nan, np.inf, -np.inf], 200)
    q_idx = rounded(rng.choice([-1, 1], (len(step.positions), 64)), dtype)
    got, want = select_both(ops, step, q_idx, k_idx, dtype, 32, 1)
    assert_same(dtype, got, want)


def test_a_nan_query_selects_the_first_positions(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(4)
    step = layout(rng, STEPS["decode-ragged"])
    q_idx = rounded(np.full((len(step.positions), 8), np.nan), dtype)
    got, want = select_both(ops, step, q_idx, normal(rng, step.num_rows, 8, dtype=dtype), dtype, 16, 1)
    assert_same(dtype, got, want)
    assert got[0][2].tolist() == list(range(16))


def test_the_same_scores_give_the_same_selection_alone_and_in_a_batch(ops: Ops) -> None:
    rng = np.random.default_rng(5)
    step = layout(rng, STEPS["decode-ragged"])
    q_idx = rounded(rng.integers(-1, 2, (len(step.positions), 8)), "float32")
    k_idx = rounded(rng.integers(-1, 2, (step.num_rows, 8)), "float32")
    memory = memory_of(ops, k_idx, "float32")
    together = arrays(ops, ops.select(ops.asarray(q_idx), memory, step.queries(ops), 48, 1))
    again = arrays(ops, ops.select(ops.asarray(q_idx), memory, step.queries(ops), 48, 1))
    assert_same("again", again, together)
    for b in range(len(step.positions)):
        one = Layout(
            step.positions[b : b + 1],
            np.zeros(1, int),
            step.block_table[b : b + 1],
            step.window_slots[b : b + 1],
            (0, 1),
            step.context_lens[b : b + 1],
            step.num_rows,
            step.num_slots,
        )
        alone = arrays(ops, ops.select(ops.asarray(q_idx[b : b + 1]), memory, one.queries(ops), 48, 1))
        positions, rows, lengths = (x[b : b + 1] for x in together)
        assert_same(f"sequence {b}", alone, (positions, rows, lengths))
