"""swiglu: silu(gate) * up, without overflow in exp(-gate)."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops
from tests.ops.cases import host, normal, rounded
from tests.tolerance import assert_close


@pytest.mark.parametrize("shape", [(1, 1), (63, 65), (2, 1000)])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_swiglu(ops: Ops, dtype: str, shape: tuple[int, int], scale: float) -> None:
    rng = np.random.default_rng(0)
    gate, up = normal(rng, *shape, dtype=dtype, scale=scale), normal(rng, *shape, dtype=dtype)
    want = spec.swiglu(spec.asarray(gate), spec.asarray(up))
    got = host(ops, ops.swiglu(ops.asarray(gate), ops.asarray(up)), dtype)
    assert_close("swiglu", dtype, got, want, (shape, scale))


def test_large_gates(ops: Ops, dtype: str) -> None:
    gate, up = rounded(np.array([-500.0, 500.0, 0.0]), dtype), rounded(np.array([3.0, 3.0, 3.0]), dtype)
    got = host(ops, ops.swiglu(ops.asarray(gate), ops.asarray(up)), dtype)
    assert got.tolist() == [0.0, rounded(np.array(1500.0), dtype).astype(float), 0.0]
