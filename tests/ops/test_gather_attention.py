"""gather_attention: the selected rows, all of them and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops, Selection
from tests.ops.cases import filled_memory, host, normal, poisoned, rounded
from tests.tolerance import assert_close

NUM_ROWS = 1024


def ragged_selection(rng: np.random.Generator, num_queries: int, k: int) -> np.ndarray:
    """Rows [T, k] int32, -1 padded: an empty row, a single one, a full one, the rest of any length."""
    rows = np.full((num_queries, k), -1, np.int32)
    for t in range(num_queries):
        length = (0, k, 1)[t] if t < 3 else rng.integers(0, k + 1)
        rows[t, :length] = rng.permutation(NUM_ROWS)[:length]
    return rows


@pytest.mark.parametrize("num_queries, k", [(1, 1), (4, 63), (65, 64), (5, 1000), (3, 1)])
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(1, 1, 2), (4, 4, 8), (4, 2, 64), (6, 2, 10), (20, 4, 16), (8, 1, 128)]
)
def test_gather_attention(
    ops: Ops, dtype: str, num_queries: int, k: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    rng = np.random.default_rng(0)
    rows = ragged_selection(rng, num_queries, k)
    read = np.zeros(NUM_ROWS, bool)
    read[rows[rows >= 0]] = True
    q = normal(rng, num_queries, heads, head_dim, dtype=dtype, scale=2.0)
    kv = [poisoned(normal(rng, NUM_ROWS, kv_heads, head_dim, dtype=dtype), read) for _ in range(2)]
    lengths = (rows >= 0).sum(1).astype(np.int32)
    got, want = (
        o.gather_attention(
            o.asarray(q),
            filled_memory(o, kv[0], kv[1], None, dtype),
            Selection(o.asarray(rows), o.asarray(rows), o.asarray(lengths)),
        )
        for o in (ops, spec)
    )
    case = (num_queries, k, heads, kv_heads, head_dim)
    result = host(ops, got, dtype)
    assert not result[lengths == 0].any(), f"{case}: a query that sees nothing must get zeros"
    assert_close("gather_attention", dtype, result, want, case)


def test_large_scores_do_not_overflow(ops: Ops, dtype: str) -> None:
    """Scores of +-20000: the softmax has to subtract the maximum, in float32."""
    q = np.full((1, 1, 4), 200.0, np.float32)
    k = np.array([[[100.0] * 4], [[-100.0] * 4], [[99.0] * 4]], np.float32)
    v = np.arange(12, dtype=np.float32).reshape(3, 1, 4)
    rows = ops.asarray(np.array([[0, 1, 2]], np.int32))
    selection = Selection(rows, rows, ops.asarray(np.array([3], np.int32)))
    memory = filled_memory(ops, rounded(k, dtype), rounded(v, dtype), None, dtype)
    got = host(ops, ops.gather_attention(ops.asarray(q, dtype), memory, selection), dtype)
    assert got[0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
