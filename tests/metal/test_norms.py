"""The kernels of norms, fused with their neighbours, against the specification."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clsa import spec
from tests.metal.kernels import check_soundness, mlx_ops, run_everywhere
from tests.ops.cases import host, normal
from tests.tolerance import assert_close

pytestmark = pytest.mark.mlx

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
POSITIONS = np.array([0, 1, 999, 511, -1], np.int32)


def on_mlx(*arrays: np.ndarray) -> list[Any]:
    return [mlx_ops().asarray(x) for x in arrays]


def angles(head_dim: int) -> Any:
    from clsa_mlx.window import frequencies

    return frequencies(head_dim // 2, 1e4)


def assert_everywhere(op: str, dtype: str, compute: Any, *wants: np.ndarray) -> None:
    for how, got in run_everywhere(compute):
        for out, want in zip(got if isinstance(got, tuple) else (got,), wants, strict=True):
            assert_close(op, dtype, host(mlx_ops(), out, dtype), want, how)


@DTYPES
@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 64), (5, 80), (20, 128), (1, 256)])
def test_norm_rope(dtype: str, heads: int, head_dim: int) -> None:
    from clsa_mlx.kernels.norm_rope import norm_rope

    rng = np.random.default_rng(1)
    x, weight = normal(rng, 5, heads, head_dim, dtype=dtype, scale=3.0), normal(rng, head_dim, dtype=dtype)
    want = spec.norm_rope(spec.asarray(x), spec.asarray(weight), 1e-6, POSITIONS, 1e4)
    mx_x, mx_weight, positions = on_mlx(x, weight, POSITIONS)
    assert_everywhere("norm_rope", dtype, lambda: norm_rope(mx_x, mx_weight, 1e-6, positions, angles(head_dim)), want)


@DTYPES
@pytest.mark.parametrize("threads", [256, 512, 1024])
@pytest.mark.parametrize("size", [1, 63, 256, 257, 2560])
def test_add_rms_norm(dtype: str, threads: int, size: int) -> None:
    from clsa_mlx.kernels.add_rms_norm import add_rms_norm

    rng = np.random.default_rng(2)
    x, y, weight = normal(rng, 3, size, dtype=dtype), normal(rng, 3, size, dtype=dtype), normal(rng, size, dtype=dtype)
    total = spec.asarray(x) + spec.asarray(y)
    normed = spec.rms_norm(total, spec.asarray(weight), 1e-6)
    mx_x, mx_y, mx_weight = on_mlx(x, y, weight)
    compute = lambda: add_rms_norm(mx_x, mx_y, mx_weight, 1e-6, threads)  # noqa: E731
    assert_everywhere("add_rms_norm", dtype, compute, total, normed)


@pytest.mark.parametrize("kernel", ["norm_rope", "add_rms_norm"])
def test_types_and_races(kernel: str) -> None:
    from clsa_mlx.kernels.add_rms_norm import add_rms_norm
    from clsa_mlx.kernels.norm_rope import norm_rope

    rng = np.random.default_rng(3)
    x, weight = normal(rng, 5, 2, 64, dtype="bfloat16"), normal(rng, 64, dtype="bfloat16")
    mx_x, mx_weight, positions = on_mlx(x, weight, POSITIONS)
    compute = {
        "norm_rope": lambda: norm_rope(mx_x, mx_weight, 1e-6, positions, angles(64)),
        "add_rms_norm": lambda: add_rms_norm(mx_x[:, 0], mx_x[:, 1], mx_weight, 1e-6),
    }[kernel]
    if missing := check_soundness(compute, launches=1):
        pytest.skip("; ".join(missing))
