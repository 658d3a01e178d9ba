"""norm_rope: QK norm per head, then first half with second half, float32 angles."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops
from tests.ops.cases import host, normal, rounded
from tests.tolerance import assert_close


@pytest.mark.parametrize("length", [1, 63, 65])
@pytest.mark.parametrize("heads, head_dim", [(1, 2), (4, 8), (3, 64), (5, 128), (2, 80)])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_norm_rope(ops: Ops, dtype: str, length: int, heads: int, head_dim: int, theta: float) -> None:
    rng = np.random.default_rng(0)
    x, weight = normal(rng, length, heads, head_dim, dtype=dtype), normal(rng, head_dim, dtype=dtype)
    positions = rng.integers(0, 1001, length).astype(np.int32)
    want = spec.norm_rope(spec.asarray(x), spec.asarray(weight), 1e-6, positions, theta)
    got = ops.norm_rope(ops.asarray(x), ops.asarray(weight), 1e-6, ops.asarray(positions), theta)
    assert_close("norm_rope", dtype, host(ops, got, dtype), want, (length, heads, head_dim, theta))


def test_heads_of_a_wider_row(ops: Ops, dtype: str) -> None:
    """A projection may be a part of a larger product."""
    rng = np.random.default_rng(0)
    x, weight = normal(rng, 5, 6, 64, dtype=dtype), normal(rng, 64, dtype=dtype)
    positions = np.arange(5, dtype=np.int32)
    part = ops.asarray(x).reshape(5, 384)[:, 128:256].reshape(5, 2, 64)
    got = ops.norm_rope(part, ops.asarray(weight), 1e-6, ops.asarray(positions), 1e4)
    want = spec.norm_rope(spec.asarray(x[:, 2:4]), spec.asarray(weight), 1e-6, positions, 1e4)
    assert_close("norm_rope", dtype, host(ops, got, dtype), want, ())


def test_position_zero_is_the_norm_alone(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = normal(rng, 3, 2, 8, dtype=dtype), normal(rng, 8, dtype=dtype)
    got = ops.norm_rope(ops.asarray(x), ops.asarray(weight), 1e-6, ops.asarray(np.zeros(3, np.int32)), 1e4)
    want = spec.rms_norm(spec.asarray(x), spec.asarray(weight), 1e-6)
    assert_close("rms_norm", dtype, host(ops, got, dtype), want, ())


def test_far_positions_keep_the_length(ops: Ops) -> None:
    x, weight = (ops.asarray(rounded(np.ones(shape), "float32")) for shape in ((2, 1, 64), (64,)))
    positions = ops.asarray(np.array([2**24 - 1, 131071], np.int32))
    got = host(ops, ops.norm_rope(x, weight, 1e-6, positions, 1e4), "float32")
    assert np.abs(np.linalg.norm(got, axis=-1) - 8).max() < 1e-4


def test_a_padded_row_does_not_touch_the_others(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = normal(rng, 3, 2, 8, dtype=dtype), normal(rng, 8, dtype=dtype)
    got = ops.norm_rope(ops.asarray(x), ops.asarray(weight), 1e-6, ops.asarray(np.array([5, -1, 6], np.int32)), 1e4)
    want = spec.norm_rope(spec.asarray(x), spec.asarray(weight), 1e-6, np.array([5, 0, 6]), 1e4)
    assert_close("norm_rope", dtype, host(ops, got, dtype)[[0, 2]], want[[0, 2]])


def test_linears_are_linear_several_times(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = ops.asarray(normal(rng, 3, 64, dtype=dtype))
    weights = [ops.asarray(normal(rng, rows, 64, dtype=dtype)) for rows in (32, 8, 40)]
    for _ in range(2):  # a backend may prepare the weights in the first call
        for got, weight in zip(ops.linears(x, weights), weights, strict=True):
            assert_close("linear", dtype, host(ops, got, dtype), host(ops, ops.linear(x, weight), dtype), ())
