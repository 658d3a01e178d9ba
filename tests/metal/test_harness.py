"""Right kernels give right results, in every order and with both placements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.metal import toys
from tests.metal.harness import Kernel, check, execute, prepare, run
from tests.metal.toys import BF16, F16, F32, I32, U32

DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)


def tolerance(dtype: np.dtype) -> float:
    return {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype.name]


@DTYPES
@pytest.mark.parametrize("n", [1, 7, 32, 255, 256, 257, 1000])
def test_add(dtype: np.dtype, n: int) -> None:
    call, expected = toys.add(n, dtype)
    check(call, expected, rtol=tolerance(dtype), atol=tolerance(dtype))


@DTYPES
@pytest.mark.parametrize("n", [1, 8, 100])
def test_score(dtype: np.dtype, n: int) -> None:
    call, expected = toys.score(n, dtype=dtype)
    check(call, expected, atol=1e-4)


@pytest.mark.parametrize("n", [64, 255, 256, 257, 3001])
@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal", "masked"])
def test_topk(n: int, kind: str) -> None:
    scores = toys.normal(n)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "all equal":
        scores[:] = 1.5
    elif kind == "masked":
        scores[::2] = -np.inf
    check(*toys.topk(scores, 50, threads=256))


def test_topk_with_the_largest_threadgroup() -> None:
    call, expected = toys.topk(np.round(toys.normal(131072), 2), 2048, threads=1024)
    np.testing.assert_array_equal(execute(call)[0], expected)


@DTYPES
@pytest.mark.parametrize("rows", [[0], [-1, 5, 2, -1, 9], [-1, -1], list(range(40))], ids=len)
def test_attention(dtype: np.dtype, rows: list[int]) -> None:
    call, expected = toys.attention(np.array(rows), dtype=dtype)
    check(call, expected, rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 25])
def test_ring(length: int) -> None:
    check(*toys.ring(length))


def test_attributes_in_a_three_dimensional_grid_with_edges() -> None:
    body = """
    uint3 at = thread_position_in_grid;
    uint i = (at.z * grid_size.y + at.y) * threads_per_grid.x + at.x;
    uint3 size = threads_per_threadgroup, full = dispatch_threads_per_threadgroup;
    uint3 inside = at - threadgroup_position_in_grid * full;
    bool right = all(inside == thread_position_in_threadgroup) && all(grid_origin == uint3(0u))
        && thread_index_in_threadgroup == (inside.z * size.y + inside.y) * size.x + inside.x
        && thread_index_in_simdgroup == thread_index_in_threadgroup % threads_per_simdgroup
        && simdgroup_index_in_threadgroup == thread_index_in_threadgroup / thread_execution_width
        && simdgroups_per_threadgroup == (size.x * size.y * size.z + 31) / 32
        && dispatch_simdgroups_per_threadgroup == (full.x * full.y * full.z + 31) / 32
        && thread_index_in_quadgroup == thread_index_in_threadgroup % 4
        && quadgroup_index_in_threadgroup == thread_index_in_threadgroup / 4;
    out[i] = right ? int(size.x * 100 + size.y * 10 + size.z) : -1;
"""
    call = prepare(
        Kernel("attributes", [], ["out"], body),
        [],
        grid=(11, 5, 3),
        threadgroup=(4, 3, 2),
        output_shapes=[(3, 5, 11)],
        output_dtypes=[I32],
    )
    x, y, z = np.array([4] * 8 + [3] * 3), np.array([3] * 3 + [2] * 2), np.array([2, 2, 1])
    check(call, 100 * x[None, None] + 10 * y[None, :, None] + z[:, None, None])


def one_simdgroup(body: str, dtype: np.dtype, *inputs: Any, n: int = 32, header: str = "") -> np.ndarray:
    """`out[lane]` of a simdgroup of n lanes, the same in all orders."""
    kernel = Kernel("lanes", [f"x{i}" for i in range(len(inputs))], ["out"], body, header)
    call = prepare(
        kernel,
        inputs,
        template=[("T", dtype)],
        grid=(n, 1, 1),
        threadgroup=(n, 1, 1),
        output_shapes=[(n,)],
        output_dtypes=[dtype],
    )
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
    x = np.concatenate([bits.view(np.float32), toys.normal(1000), np.float32([0, -0.0, np.inf, -np.inf, 65519, 65520])])
    call = prepare(
        Kernel("convert", ["x"], ["y"], "uint i = thread_position_in_grid.x; y[i] = T(x[i]);"),
        [x],
        template=[("T", dtype)],
        grid=(x.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[dtype],
    )
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
    y = run(
        kernel, [x], grid=(65536, 1, 1), threadgroup=(1024, 1, 1), output_shapes=[x.shape], output_dtypes=[F32]
    )[0]
    np.testing.assert_array_equal(y, x.astype(np.float32))


def test_small_float_arithmetic_rounds_every_operation() -> None:
    body = "uint i = thread_index_in_simdgroup; T a = x0[i], b = x1[i]; T c = a * b; c += a; c = c / T(3); out[i] = -c;"
    for dtype in (F16, BF16):
        a, b = toys.normal(32, dtype), toys.normal(32, dtype, seed=1)
        expected = -((((a * b).astype(dtype) + a).astype(dtype)) / dtype.type(3)).astype(dtype)
        np.testing.assert_array_equal(one_simdgroup(body, dtype, a, b), expected)


FLOAT = {
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


def test_atomics_in_device_memory_over_many_threadgroups() -> None:
    kernel = Kernel(
        "histogram",
        ["x"],
        ["counts"],
        "atomic_fetch_add_explicit(&counts[x[thread_position_in_grid.x]], 1, memory_order_relaxed);",
        atomic_outputs=True,
    )
    x = np.random.default_rng(0).integers(0, 10, 1000).astype(np.uint32)
    for dtype in (U32, I32, F32):
        call = prepare(
            kernel,
            [x],
            init_value=0,
            grid=(1000, 1, 1),
            threadgroup=(64, 1, 1),
            output_shapes=[(10,)],
            output_dtypes=[dtype],
        )
        check(call, np.bincount(x, minlength=10))


def test_shape_strides_and_ndim() -> None:
    body = "uint i = thread_position_in_grid.x; out[i] = x[elem_to_loc(int(i), x_shape, x_strides, x_ndim)];"
    x = toys.normal((4, 3, 5))
    for row_contiguous in (True, False):
        kernel = Kernel("strided", ["x"], ["out"], body, ensure_row_contiguous=row_contiguous)
        for view in (x, x.T, x[:, 1], x[::2, :, ::2]):
            call = prepare(
                kernel,
                [view],
                grid=(view.size, 1, 1),
                threadgroup=(32, 1, 1),
                output_shapes=[view.shape],
                output_dtypes=[F32],
            )
            check(call, view)


def test_simdgroup_matrix() -> None:
    body = """
    simdgroup_float8x8 a, b, c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
    simdgroup_load(a, x, 16, ulong2(8, 0));
    simdgroup_load(b, y, 8, 0, true);
    simdgroup_multiply_accumulate(c, a, b, c);
    simdgroup_store(c, out, 8);
    if (thread_index_in_simdgroup == 99) { out[0] = 0; }
"""
    x, y = toys.normal((8, 16)), toys.normal((8, 8), seed=1)
    call = prepare(
        Kernel("matrix", ["x", "y"], ["out"], body),
        [x, y],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(8, 8)],
        output_dtypes=[F32],
    )
    check(call, x[:, 8:] @ y.T + 1, rtol=1e-5, atol=1e-5)


def test_values_that_look_like_poison_are_written_values() -> None:
    for dtype, poison in ((np.dtype(np.uint8), 0xCB), (U32, 0xCBCBCBCB)):
        kernel = Kernel("constant", [], ["out"], f"out[thread_position_in_grid.x] = {poison}u;")
        call = prepare(kernel, [], grid=(9, 1, 1), threadgroup=(9, 1, 1), output_shapes=[(9,)], output_dtypes=[dtype])
        check(call, np.full(9, poison))


@pytest.mark.mlx
def test_patched_mlx_runs_kernels_with_mlx_arrays() -> None:
    import mlx.core as mx

    from tests.metal.harness.on_cpu import metal_on_cpu

    original = mx.fast.metal_kernel
    seen = []
    with metal_on_cpu(order="reverse", watch=lambda kernel, outputs: seen.append((kernel.name, len(outputs)))):
        assert mx.metal.is_available()
        function = mx.fast.metal_kernel(
            name="scale", input_names=["x", "s"], output_names=["y"],
            source="uint i = thread_position_in_grid.x; y[i] = T(float(x[i]) * s);",
        )  # fmt: skip
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            x = mx.arange(12).astype(dtype).reshape(3, 4).T
            (y,) = function(
                inputs=[x, 2.0], template=[("T", dtype)], grid=(12, 1, 1), threadgroup=(32, 1, 1),
                output_shapes=[x.shape], output_dtypes=[dtype],
            )  # fmt: skip
            assert y.dtype == dtype
            assert mx.array_equal(y, x * 2)
    assert seen == [("scale", 1)] * 3
    assert mx.fast.metal_kernel is original
