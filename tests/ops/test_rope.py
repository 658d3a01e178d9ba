"""rope: first half with second half, float32 angles."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops
from tests.ops.cases import host, normal, rounded
from tests.tolerance import assert_close


@pytest.mark.parametrize("length", [1, 63, 65])
@pytest.mark.parametrize("heads, head_dim", [(1, 2), (4, 8), (3, 64), (5, 128)])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rope(ops: Ops, dtype: str, length: int, heads: int, head_dim: int, theta: float) -> None:
    rng = np.random.default_rng(0)
    x = normal(rng, length, heads, head_dim, dtype=dtype)
    positions = rng.integers(0, 1001, length).astype(np.int32)
    want = spec.rope(spec.asarray(x), positions, theta)
    got = host(ops, ops.rope(ops.asarray(x), ops.asarray(positions), theta), dtype)
    assert_close("rope", dtype, got, want, (length, heads, head_dim, theta))


def test_position_zero_changes_nothing(ops: Ops, dtype: str) -> None:
    x = normal(np.random.default_rng(0), 3, 2, 8, dtype=dtype)
    got = host(ops, ops.rope(ops.asarray(x), ops.asarray(np.zeros(3, np.int32)), 1e4), dtype)
    assert np.array_equal(got, x.astype(np.float64))


def test_far_positions_keep_the_length(ops: Ops) -> None:
    x = rounded(np.ones((2, 1, 64)), "float32")
    positions = ops.asarray(np.array([2**24 - 1, 131071], np.int32))
    got = host(ops, ops.rope(ops.asarray(x), positions, 1e4), "float32")
    assert np.abs(np.linalg.norm(got, axis=-1) - 8).max() < 1e-4


def test_a_padded_row_does_not_touch_the_others(ops: Ops, dtype: str) -> None:
    x = normal(np.random.default_rng(0), 3, 2, 8, dtype=dtype)
    got = host(ops, ops.rope(ops.asarray(x), ops.asarray(np.array([5, -1, 6], np.int32)), 1e4), dtype)
    want = spec.rope(spec.asarray(x), np.array([5, 0, 6]), 1e4)
    assert_close("rope", dtype, got[[0, 2]], want[[0, 2]])
