"""linear: x @ weight.T with float32 accumulation."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops
from tests.ops.cases import host, normal, rounded
from tests.tolerance import assert_close


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 111), (63, 65, 1), (65, 111, 63), (7, 1000, 64)])
def test_linear(ops: Ops, dtype: str, shape: tuple[int, int, int]) -> None:
    rows, width, out_width = shape
    rng = np.random.default_rng(0)
    x, weight = normal(rng, rows, width, dtype=dtype), normal(rng, out_width, width, dtype=dtype)
    want = spec.linear(spec.asarray(x), spec.asarray(weight))
    assert_close("linear", dtype, host(ops, ops.linear(ops.asarray(x), ops.asarray(weight)), dtype), want, shape)


def test_leading_axes(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = normal(rng, 3, 5, 64, dtype=dtype), normal(rng, 7, 64, dtype=dtype)
    want = spec.linear(spec.asarray(x), spec.asarray(weight))
    assert_close("linear", dtype, host(ops, ops.linear(ops.asarray(x), ops.asarray(weight)), dtype), want)


def test_accumulates_wider_than_the_dtype(ops: Ops, dtype: str) -> None:
    """2048 ones and one big cancelling pair: a 16-bit running sum would stop growing at 256 or 2048."""
    x = rounded(np.ones((1, 2050)), dtype)
    weight = rounded(np.r_[4096.0, np.ones(2048), -4096.0][None], dtype)
    assert host(ops, ops.linear(ops.asarray(x), ops.asarray(weight)), dtype)[0, 0] == 2048.0


def test_float32_is_not_tf32(ops: Ops) -> None:
    x = rounded(np.full((64, 64), 1 + 2.0**-20), "float32")
    weight = rounded(np.eye(64), "float32")
    assert np.array_equal(host(ops, ops.linear(ops.asarray(x), ops.asarray(weight)), "float32"), x)
