"""rms_norm: statistics in float32 whatever the dtype."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops
from tests.ops.cases import host, normal
from tests.tolerance import assert_close


@pytest.mark.parametrize("shape", [(1, 1), (63, 64), (65, 111), (2, 1000), (5, 4, 8), (3, 2, 65)])
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e-3])  # 300 squared does not fit float16
def test_rms_norm(ops: Ops, dtype: str, shape: tuple[int, ...], scale: float) -> None:
    rng = np.random.default_rng(0)
    x, weight = normal(rng, *shape, dtype=dtype, scale=scale), normal(rng, shape[-1], dtype=dtype)
    want = spec.rms_norm(spec.asarray(x), spec.asarray(weight), 1e-6)
    got = ops.rms_norm(ops.asarray(x), ops.asarray(weight), 1e-6)
    assert_close("rms_norm", dtype, host(ops, got, dtype), want, (shape, scale))


def test_zeros_stay_zeros(ops: Ops, dtype: str) -> None:
    x, weight = np.zeros((3, 64), np.float32), np.ones(64, np.float32)
    got = ops.rms_norm(ops.asarray(x, dtype), ops.asarray(weight, dtype), 1e-6)
    assert not host(ops, got, dtype).any()
