"""clang's view of address spaces: right kernels pass, each kind of mistake is an error with its line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.metal import toys
from tests.metal.harness import Call, CompileError, Kernel, execute, prepare
from tests.metal.harness.typecheck import check_types, clang
from tests.metal.toys import BF16, F16, F32


@pytest.fixture(autouse=True)
def _needs_clang() -> None:
    if clang() is None:
        pytest.skip("no clang++: install clang (16 or newer) to check address spaces")


RIGHT: dict[str, Callable[[], Call]] = {
    "add": lambda: toys.add()[0],
    "add of few elements": lambda: toys.add(n=5)[0],
    "add bf16": lambda: toys.add(dtype=BF16)[0],
    "score f16": lambda: toys.score(dtype=F16)[0],
    "score bf16": lambda: toys.score(dtype=BF16)[0],
    "topk": lambda: toys.topk(toys.normal(100), 9)[0],
    "attention bf16": lambda: toys.attention(np.arange(20), dtype=BF16)[0],
    "ring": lambda: toys.ring(9)[0],
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass(name: str) -> None:
    check_types(RIGHT[name]())


HEADER = """
METAL_FUNC float first(const device float* p) { return p[0]; }
METAL_FUNC void add_to(threadgroup float* p, float v) { p[0] += v; }
METAL_FUNC void add_to_copy(thread float* p, float v) { p[0] += v; }
"""
WRONG = {
    "threadgroup array to a device pointer": ("y[i] = first(a);", "no matching function for call to 'first'"),
    "device buffer to a threadgroup pointer": ("add_to(y, 1.0f);", "no matching function for call to 'add_to'"),
    "threadgroup array to a thread pointer": (
        "add_to_copy(a, 1.0f);",
        "no matching function for call to 'add_to_copy'",
    ),
    "a pointer without its space": ("const float* p = x; y[i] = p[i];", "changes address space|cannot initialize"),
    "a constant input as device": (
        "const device float* p = few; y[i] = p[0];",
        "changes address space|cannot initialize",
    ),
    "a write to an input": ("x[i] = 1;", "read-only variable is not assignable|cannot assign"),
    "a device pointer that drops const": ("device float* p = x; y[i] = p[i];", "cannot initialize"),
    "a double": ("double d = 1; y[i] = float(d);", "Metal has no double"),
    "a double by a literal": ("y[i] = y[i] * 2.5;", "implicit conversion increases floating-point precision"),
    "a float atomic in threadgroup memory": (
        "threadgroup atomic<float> f; atomic_fetch_add_explicit(&f, 1.0f, memory_order_relaxed);",
        "no matching function for call to 'atomic_fetch_add_explicit'",
    ),
    "an atomic function on plain memory": (
        "atomic_fetch_add_explicit(&y[i], 1.0f, memory_order_relaxed);",
        "no matching function for call to 'atomic_fetch_add_explicit'",
    ),
    "two types in max": ("y[i] = max(x[i], 0);", "no matching function for call to 'max'"),
    "a vector of other elements": ("half4 h = half4(1.0h); float4 f = h; y[i] = f.x;", "cannot initialize"),
}


def _call(statement: str) -> Call:
    body = f"threadgroup float a[32];\nuint i = thread_position_in_grid.x;\na[i] = x[i];\n{statement}\n"
    kernel = Kernel("types", ["x", "few"], ["y"], body, HEADER)
    return prepare(
        kernel,
        [toys.normal(32), toys.normal(3)],
        template=[("T", F32)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(32,)],
        output_dtypes=[F32],
    )


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_errors(name: str) -> None:
    statement, message = WRONG[name]
    with pytest.raises(CompileError, match=message) as caught:
        check_types(_call(statement))
    assert "types.body:4" in str(caught.value)


RIGHT_STATEMENTS = [
    "auto p = few; y[i] = p[0];",
    "auto p = x + i; y[i] = *p;",
    "y[i] = first(x) + first(x + 3);",
    "add_to(a, 1.0f); add_to_copy(&y_local, 1.0f); y[i] = y_local;",
    "float4 v = float4(1.0f, y_local, a[i], few[0]); y[i] = v.x + dot(v.xy, v.zw) + v.xyz.z;",
    "const device half4* p = (const device half4*)x; float4 f = float4(p[0]); y[i] = f.w;",
    "threadgroup atomic_uint n; atomic_fetch_max_explicit(&n, i, memory_order_relaxed);",
    "simdgroup_float8x8 m; simdgroup_load(m, x, 3); simdgroup_store(m, a, 3); y[i] = a[i];",
    "y[i] = simd_sum(simd_shuffle_xor(x[i], 3)) * float(popcount(uint(ulong(simd_ballot(x[i] > 0)))));",
    "y[i] = metal::precise::exp(-INFINITY) + fast::rsqrt(2.0f) + float(as_type<half>(ushort(3)));",
]


@pytest.mark.parametrize("statement", RIGHT_STATEMENTS)
def test_right_statements_pass_and_run(statement: str) -> None:
    call = _call(f"float y_local = 0; y[i] = 0; {statement}")
    check_types(call)
    execute(call)
