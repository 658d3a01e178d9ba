"""Right kernels give right results, in every order and with both placements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.metal import toys
from tests.metal.harness import Kernel, check, execute, prepare
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
            check(toys.launch(kernel, [view], view.size, 32, view.shape, F32), view)


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
    kernel = Kernel("matrix", ["x", "y"], ["out"], body)
    check(toys.launch(kernel, [x, y], 32, 32, (8, 8), F32), x[:, 8:] @ y.T + 1, rtol=1e-5, atol=1e-5)


def test_values_that_look_like_poison_are_written_values() -> None:
    for dtype, poison in ((np.dtype(np.uint8), 0xCB), (U32, 0xCBCBCBCB)):
        kernel = Kernel("constant", [], ["out"], f"out[thread_position_in_grid.x] = {poison}u;")
        check(toys.launch(kernel, [], 9, 9, (9,), dtype), np.full(9, poison))


@pytest.mark.mlx
def test_patched_mlx_runs_kernels_with_mlx_arrays() -> None:
    import mlx.core as mx

    from tests.metal.harness.on_cpu import metal_on_cpu

    original: Any = mx.fast.metal_kernel
    seen = []
    with metal_on_cpu(order="reverse", watch=lambda call, outputs: seen.append((call.source.function, len(outputs)))):
        assert mx.metal.is_available()
        metal_kernel: Any = mx.fast.metal_kernel
        body = "uint i = thread_position_in_grid.x; y[i] = T(float(x[i]) * s);"
        function = metal_kernel(name="scale", input_names=["x", "s"], output_names=["y"], source=body)
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            x = mx.arange(12).astype(dtype).reshape(3, 4).T
            (y,) = function(
                inputs=[x, 2.0],
                template=[("T", dtype)],
                grid=(12, 1, 1),
                threadgroup=(32, 1, 1),
                output_shapes=[x.shape],
                output_dtypes=[dtype],
            )
            assert y.dtype == dtype
            assert mx.array_equal(y, x * 2)
    names = [f"custom_kernel_scale__{t}_{t}_floats_{t}" for t in ("float", "float16_t", "bfloat16_t")]
    assert seen == [(name, 1) for name in names]
    assert mx.fast.metal_kernel is original
