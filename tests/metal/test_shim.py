"""The functions and types of the Metal Shading Language as the shim gives them, against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.metal import toys
from tests.metal.harness import Kernel, check, execute
from tests.metal.toys import BF16, F16, F32, I32

DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)


def one_simdgroup(body: str, dtype: np.dtype, *inputs: Any, n: int = 32, header: str = "") -> np.ndarray:
    """`out[lane]` of a simdgroup of n lanes, the same in all orders."""
    kernel = Kernel("lanes", [f"x{i}" for i in range(len(inputs))], ["out"], body, header)
    call = toys.launch(kernel, inputs, n, n, (n,), dtype, T=dtype)
    output = execute(call)[0]
    check(call, output)
    return output


X = np.arange(1, 33, dtype=np.int32)
LANES = np.arange(32)
SIMD = {
    "simd_sum(v)": np.full(32, X.sum()),
    "simd_max(v)": np.full(32, 32),
    "simd_min(v)": np.full(32, 1),
    "simd_or(v)": np.full(32, 63),
    "simd_and(v | 64)": np.full(32, 64),
    "simd_xor(v)": np.full(32, np.bitwise_xor.reduce(X)),
    "simd_product(lane < 4 ? v : 1)": np.full(32, 24),
    "simd_prefix_inclusive_sum(v)": np.cumsum(X),
    "simd_prefix_exclusive_sum(v)": np.cumsum(X) - X,
    "simd_prefix_inclusive_product(lane < 4 ? v : 1)": np.cumprod(np.where(LANES < 4, X, 1)),
    "simd_broadcast(v, 5)": np.full(32, 6),
    "simd_broadcast_first(v)": np.full(32, 1),
    "simd_shuffle(v, (lane * 7) % 32)": X[LANES * 7 % 32],
    "simd_shuffle_xor(v, 5)": X[LANES ^ 5],
    "simd_shuffle_up(v, 3)": X[np.where(LANES < 3, LANES, LANES - 3)],
    "simd_shuffle_down(v, 3)": X[np.where(LANES > 28, LANES, LANES + 3)],
    "simd_shuffle_rotate_up(v, 3)": np.roll(X, 3),
    "simd_shuffle_rotate_down(v, 3)": np.roll(X, -3),
    "simd_shuffle_and_fill_up(v, -v, 3)": np.concatenate([-X[-3:], X[:-3]]),
    "simd_shuffle_and_fill_down(v, -v, 3)": np.concatenate([X[3:], -X[:3]]),
    "int(uint(ulong(simd_ballot(v % 3 == 0)) & 0xffff))": np.full(32, sum(1 << i for i in range(2, 16, 3))),
    "int((simd_vote::vote_t)simd_active_threads_mask() == 0xffffffff)": np.ones(32),
    "simd_any(v == 7) ? 1 : 0": np.ones(32),
    "simd_all(v > 1) ? 1 : 0": np.zeros(32),
    "simd_is_first() ? 1 : 0": LANES == 0,
}


@pytest.mark.parametrize("expression", SIMD)
def test_simd_functions(expression: str) -> None:
    body = f"uint lane = thread_index_in_simdgroup; int v = x0[lane]; out[lane] = {expression};"
    np.testing.assert_array_equal(one_simdgroup(body, I32, X), SIMD[expression])


def test_simd_functions_in_a_simdgroup_of_few_lanes() -> None:
    body = "uint i = thread_index_in_simdgroup; out[i] = simd_sum(x0[i]) + simd_prefix_exclusive_sum(x0[i]);"
    x = X[:9]
    np.testing.assert_array_equal(one_simdgroup(body, I32, x, n=9), x.sum() + np.cumsum(x) - x)


@DTYPES
def test_conversions_round_to_nearest_even(dtype: np.dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    special = np.array([0, -0.0, np.inf, -np.inf, 65519, 65520], np.float32)
    x = np.concatenate([bits.view(np.float32), toys.normal(1000), special])
    kernel = Kernel("convert", ["x"], ["y"], "uint i = thread_position_in_grid.x; y[i] = T(x[i]);")
    call = toys.launch(kernel, [x], x.size, 256, x.shape, dtype, T=dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype)
    output = execute(call)[0]
    number = ~np.isnan(x)
    np.testing.assert_array_equal(output[number].view(np.uint8), expected[number].view(np.uint8))
    assert np.isnan(output[~number]).all()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_every_small_float_becomes_the_right_float(dtype: np.dtype) -> None:
    x = np.arange(65536).astype(np.uint16).view(dtype)
    kernel = Kernel("widen", ["x"], ["y"], "uint i = thread_position_in_grid.x; y[i] = float(x[i]);")
    check(toys.launch(kernel, [x], 65536, 1024, x.shape, F32), x.astype(np.float32))


def test_small_float_arithmetic_rounds_every_operation() -> None:
    body = "uint i = thread_index_in_simdgroup; T a = x0[i], b = x1[i]; T c = a * b; c += a; c = c / T(3); out[i] = -c;"
    for dtype in (F16, BF16):
        a, b = toys.normal(32, dtype), toys.normal(32, dtype, seed=1)
        expected = -((((a * b).astype(dtype) + a).astype(dtype)) / dtype.type(3)).astype(dtype)
        np.testing.assert_array_equal(one_simdgroup(body, dtype, a, b), expected)


FLOAT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp(v)": np.exp,
    "fast::exp2(v)": np.exp2,
    "metal::precise::log(abs(v))": lambda x: np.log(np.abs(x)),
    "log2(fabs(v))": lambda x: np.log2(np.abs(x)),
    "rsqrt(v * v)": lambda x: 1 / np.abs(x),
    "metal::fast::tanh(v)": np.tanh,
    "clamp(v, -0.5f, 0.5f)": lambda x: np.clip(x, -0.5, 0.5),
    "fma(v, v, 1.0f)": lambda x: x * x + 1,
    "select(v, 0.0f, v < 0.0f)": lambda x: np.maximum(x, 0),
    "max(v, NAN)": lambda x: x,
    "v * 2.0": lambda x: x * 2,
    "dot(float4(v, v, 1.0f, 2.0f), float4(1.0f, v, 3.0f, 0.5f))": lambda x: x + x * x + 4,
    "length(float2(3.0f * v, 4.0f * v))": lambda x: 5 * np.abs(x),
    "float(half4(v).w + half(1))": lambda x: (x.astype(F16) + F16.type(1)).astype(np.float64),
    "float(as_type<bfloat>(ushort(as_type<uint>(v) >> 16)))": lambda x: (
        (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    ),
    "isfinite(v / 0.0f) ? 1.0f : 0.0f": np.zeros_like,
}


@pytest.mark.parametrize("expression", FLOAT)
def test_math(expression: str) -> None:
    x = toys.normal(32)
    body = f"uint i = thread_index_in_simdgroup; float v = x0[i]; out[i] = {expression};"
    np.testing.assert_allclose(one_simdgroup(body, F32, x), FLOAT[expression](x), rtol=2e-6, atol=1e-6)


def test_swizzles_read_and_write() -> None:
    body = """
    float4 a = float4(1.0f, 2.0f, 3.0f, 4.0f), b = 0;
    float3 c = a.xyz;
    b.xy = a.zw;          // 3 4 0 0
    b.yw = float2(7, 8);  // 3 7 0 8
    b.xyz = c + b.xyz;    // 4 9 3 8
    a.xz = b.xz;          // 4 2 3 4
    uint i = thread_index_in_simdgroup;
    out[i] = i < 4 ? a[i] * 10 + b[i] : float(sizeof(float3));
"""
    np.testing.assert_array_equal(one_simdgroup(body, F32, n=5), [44, 29, 33, 48, 16])
