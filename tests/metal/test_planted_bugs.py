"""A test of the tests: each class of bug, planted into a kernel that was right, makes the harness fail.

Every case states what the message must say, so that a bug is found for its own reason.
"""

from __future__ import annotations

import dataclasses
import platform
import re
from typing import Any

import numpy as np
import pytest

from tests.metal import toys
from tests.metal.harness import CompileError, Kernel, KernelError, check, execute, prepare
from tests.metal.toys import F32


def planted(kernel: Kernel, right: str, wrong: str, nth: int = 0) -> Kernel:
    """The kernel with one piece of its body replaced."""
    places = [match.start() for match in re.finditer(re.escape(right), kernel.source)]
    at = places[nth]
    source = kernel.source[:at] + wrong + kernel.source[at + len(right) :]
    return dataclasses.replace(kernel, source=source)


def fails(call: Any, *expected: np.ndarray, match: str, **tolerance: float) -> None:
    with pytest.raises(KernelError, match=match):
        check(call, *expected, **tolerance)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.parametrize("nth", range(TOPK_BARRIERS := toys.TOPK.source.count(BARRIER)))
def test_missing_barrier_in_topk(nth: int) -> None:
    scores = np.round(toys.normal(1000))
    check(*toys.topk(scores, 100, threads=256))
    kernel = planted(toys.TOPK, BARRIER, "", nth)
    # Only the order of execution is wrong: values, or places computed from values that were not there yet.
    message = "elements wrong|outside (buffer|threadgroup array)|no thread wrote"
    fails(*toys.topk(scores, 100, threads=256, kernel=kernel), match=message)


@pytest.mark.parametrize("nth", range(2))
def test_missing_barrier_in_attention(nth: int) -> None:
    kernel = planted(toys.ATTENTION, BARRIER, "", nth)
    fails(*toys.attention(np.arange(20), kernel=kernel), match="elements wrong", rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("(n - kept + i + 1) % W", "2 of 10 elements wrong|10 of 10 elements wrong"),
        ("(n - kept + i) % (W + 1)", r"read outside buffer 'ring' \(40 bytes\) at byte 40, element 10"),
    ],
)
def test_off_by_one_in_a_ring(wrong: str, message: str) -> None:
    kernel = planted(toys.RING, "(n - kept + i) % W", wrong)
    fails(*toys.ring(25, kernel=kernel), match=message)


def test_tie_order() -> None:
    """Scanned backwards: right without ties, so only ties can tell."""
    kernel = planted(toys.TOPK, "uint i = start + me;", "uint i = N - 1 - start - me;")
    distinct, ties = toys.normal(1000), np.round(toys.normal(1000))
    call, expected = toys.topk(distinct, 100, kernel=kernel)
    check(call, expected[::-1])
    call, expected = toys.topk(ties, 100, kernel=kernel)
    fails(call, expected[::-1], match="elements wrong")


def test_minus_one_is_read() -> None:
    kernel = planted(toys.ATTENTION, "if (rows[i] < 0) continue;", "")
    call, expected = toys.attention(np.array([3, -1, 5]), kernel=kernel)
    fails(call, expected, match=r"elements wrong|read outside buffer 'keys' .* at byte -\d+", rtol=1e-4, atol=1e-4)
    with pytest.raises(KernelError, match=r"read outside buffer 'keys' \(4096 bytes\) at byte -512, element -128"):
        execute(call, place="start")


def test_unwritten_tail() -> None:
    kernel = planted(toys.ADD, "c[i] =", "if (i + 1 < threads_per_grid.x) c[i] =")
    message = r"output 'c' has 1 of 1000 elements that no thread wrote, .*the first at \(999,\)"
    fails(*toys.add(kernel=kernel), match=message)


def test_an_initial_value_does_not_hide_a_wrong_tail() -> None:
    kernel = planted(toys.ADD, "c[i] =", "if (i + 1 < threads_per_grid.x) c[i] =")
    call, expected = toys.add(kernel=kernel)
    for buffer in call.buffers:
        if buffer.writable:
            buffer.array[:] = 0
    fails(dataclasses.replace(call, initialised=True), expected, match="1 of 1000 elements wrong", atol=1e-5)


@pytest.mark.parametrize("floats", [8192, 8448])
def test_33_kilobytes_of_threadgroup_memory(floats: int) -> None:
    body = f"threadgroup float big[{floats}]; uint i = thread_position_in_grid.x; big[i] = 1; y[i] = big[i];"
    call = _one(Kernel("big", [], ["y"], body))
    if floats == 8192:
        check(call, np.ones(32))
    else:
        fails(call, np.ones(32), match=r"threadgroup memory size \(33792\) exceeds .* \(32768\) with 'big'")


def test_partial_barrier() -> None:
    kernel = planted(toys.TOPK, BARRIER, f"if (me != 77) {{ {BARRIER} }}")
    fails(
        *toys.topk(toys.normal(1000), 100, threads=256, kernel=kernel),
        match=r"different barriers: topk\.body:\d+ and topk\.body:\d+; threadgroup \(0, 0, 0\)",
    )


def test_return_before_a_barrier() -> None:
    body = "if (thread_position_in_grid.x == 40) return; threadgroup_barrier(mem_flags::mem_device); y[0] = 1;"
    fails(
        _one(Kernel("early", [], ["y"], body), n=64),
        np.ones(64),
        match=r"threadgroup_barrier at early\.body:1 is reached by 63 of 64 threads.*thread \(40, 0, 0\)",
    )


def test_divergent_simd_operation() -> None:
    kernel = planted(toys.SCORE, "sum = simd_sum(sum);", "if (lane < 20) sum = simd_sum(sum);")
    message = r"simd_sum at score\.body:9 is reached by 20 of 32 lanes .*000fffff\); 12 returned, 0 wait"
    fails(*toys.score(kernel=kernel), match=message, atol=1e-4)


def test_two_different_simd_operations() -> None:
    body = "uint i = thread_position_in_grid.x;\nif (i < 8) y[i] = simd_sum(1.0f);\nelse y[i] = simd_max(1.0f);"
    message = (
        r"different collectives: simd_(sum at two\.body:2|max at two\.body:3) and simd_(max|sum) at two\.body:[23]"
    )
    fails(_one(Kernel("two", [], ["y"], body)), np.ones(32), match=message)


def test_numbering_that_is_wrong_in_the_edge_threadgroup() -> None:
    kernel = planted(
        toys.SCORE,
        "thread_position_in_grid.x / 32;",
        "threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;",
    )
    check(*toys.score(96, kernel=kernel)[:1], toys.score(96)[1], atol=1e-4)  # hidden without an edge
    call, expected = toys.score(100, kernel=kernel)
    fails(call, expected, match="4 of 100 elements that no thread wrote", atol=1e-4)


END = r"\(128 bytes\) at byte 128, element 32; threadgroup \(0, 0, 0\), thread"
OUT_OF_BOUNDS = [
    ("y[i + 1] = 1;", rf"outside buffer 'y' {END} \(31, 0, 0\), bad\.body:3"),
    ("y[i] = x[i + 1];", rf"outside buffer 'x' {END} \(31, 0, 0\), bad\.body:3"),
    ("y[i] = float4(((const device float4*)x)[i]).x;", rf"outside buffer 'x' {END} \(8, 0, 0\)"),
    ("y[i] = x[i - 1u];", r"outside buffer 'x' \(128 bytes\) at byte 17179869180, element 4294967295"),
    ("((device float*)x)[i] = 1; y[i] = 1;", r"in read-only buffer 'x' \(128 bytes\) at byte 0, element 0"),
    ("a[i + 1] = 1; y[i] = 1;", rf"outside threadgroup array 'a' {END} \(31, 0, 0\)"),
    ("y[i] = *(const device float*)(size_t(i) + 8);", "at address 0x8, which belongs to no buffer"),
]


@pytest.mark.parametrize(("statement", "message"), OUT_OF_BOUNDS, ids=lambda value: value[:20])
def test_out_of_bounds(statement: str, message: str) -> None:
    body = f"threadgroup float a[32];\nuint i = thread_position_in_grid.x; a[i] = 0;\n{statement}\n"
    fails(_one(Kernel("bad", ["x"], ["y"], body), np.zeros(32, np.float32)), np.ones(32), match=message)


MISUSE = {
    "y[i] = simd_shuffle(1.0f, i + 1);": r"lane 32, which does not exist; .*thread \(31, 0, 0\)",
    "y[i] = simd_broadcast(1.0f, i);": r"simd_broadcast at bad\.body:2 has another argument \(1\) than the first lane",
    "while (y != nullptr) { y[i] += 1; }": r"did not end within 0\.2 seconds.*bad\.body:2",
    "threadgroup_barrier(mem_flags::mem_none); float b[40000]; for (uint j = 0; j < 40000; ++j) b[j] = j;"
    " threadgroup_barrier(mem_flags::mem_none); y[i] = b[i * 9];": "need more than its stack",
    "y[i] = float(a[i]);": "32 of 32 elements that no thread wrote, or that were copied from memory that none wrote",
    "y[i] = a[i] * 0.5f;": r"elements wrong, the first at \(0,\): -13355979.0, expected 1",  # half of 0xCBCBCBCB
}


@pytest.mark.parametrize("statement", MISUSE, ids=lambda value: value[:25])
def test_misuse(statement: str) -> None:
    body = f"threadgroup float a[32]; uint i = thread_position_in_grid.x;\n{statement}"
    fails(_one(Kernel("bad", [], ["y"], body)), np.ones(32), match=MISUSE[statement], timeout=0.2)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 traps a division by zero")
def test_integer_division_by_zero() -> None:
    body = "uint i = thread_position_in_grid.x;\ny[i] = float(7 / (int(i) - int(threads_per_grid.x) / 2));"
    message = r"integer division by zero; threadgroup \(0, 0, 0\), thread \(16, 0, 0\), bad\.body:2"
    fails(_one(Kernel("bad", [], ["y"], body)), np.ones(32), match=message)


LIMITS: dict[str, tuple[dict[str, Any], str]] = {
    "threads": ({"threadgroup": (1025, 1, 1)}, r"thread group size \(1025\) is greater than the maximum .* \(1024\)"),
    "registers": (
        {"threadgroup": (1024, 1, 1), "max_threads": 896},
        r"\(1024\) is greater than the maximum .* \(896\)",
    ),
    "grid": ({"grid": (0, 1, 1)}, "must be 1 or more"),
    "outputs": ({"output_dtypes": [F32, F32]}, r"expected 1 output_dtypes \(y\), got 2"),
    "dtype": ({"output_dtypes": [np.float64]}, "'y' has dtype float64, which MLX does not have"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limits_of_a_launch(limit: str) -> None:
    arguments, message = LIMITS[limit]
    with pytest.raises(KernelError, match=message):
        _one(Kernel("limit", [], ["y"], "y[thread_position_in_grid.x] = 1;"), **arguments)


def test_31_buffers() -> None:
    names = [f"x{i}" for i in range(29)]
    arrays = [np.ones(8, np.float32)] * 29
    body = "y[thread_position_in_grid.x] = float(x0_shape[0]) + " + " + ".join(f"{name}[0]" for name in names) + ";"
    check(_one(Kernel("many", names, ["y"], body), *arrays), np.full(32, 37))
    with pytest.raises(KernelError, match=r"many has 32 buffers .* at most 31"):
        _one(Kernel("many", names, ["y"], body + "// x1_shape"), *arrays)


INVALID = {
    "bfloat z = 1.0f; y[i] = float(z);": r"bad\.body:2:.*error",
    "y[i] = max(float(i), 0);": r"bad\.body:2:.*no matching function.*max",
    "threadgroup atomic_uint n; atomic_fetch_add_explicit(&n, 1, memory_order_seq_cst);": "memory_order_seq_cst",
    "threadgroup atomic<half> n; y[i] = 1;": "atomics of int, uint and float only",
    "threadgroup float f[8] = {0}; y[i] = f[0];": r"bad\.body:2: write threadgroup variables as",
    "if (i == 0) { threadgroup float f[8]; f[0] = 1; }": r"bad\.body:2: threadgroup variables must be defined at",
    "y[i] = float4(1.0f, 2.0f).x;": "wrong number of elements",
    "half4 h = half4(1.0f); y[i] = float4(h * 2.0f).x;": "no match for .*operator|invalid operands",
    "y[i] = x[i];": "'x' was not declared|undeclared identifier 'x'",
    "y[i] = thread_index_in_simdgroup_of(i);": "thread_index_in_simdgroup_of",
}


@pytest.mark.parametrize("statement", INVALID, ids=lambda value: value[:25])
def test_text_that_metal_would_not_compile(statement: str) -> None:
    with pytest.raises(CompileError, match=INVALID[statement]):
        execute(_one(Kernel("bad", [], ["y"], f"uint i = thread_position_in_grid.x;\n{statement}")))


def test_threadgroup_variable_in_a_function_of_the_header() -> None:
    header = "\nvoid f() { threadgroup float a[4]; a[0] = 1; }\n"
    with pytest.raises(CompileError, match=r"bad\.header:2: threadgroup variables belong into the body"):
        execute(_one(Kernel("bad", [], ["y"], "y[0] = 1;", header)))


def test_the_next_launch_is_clean_after_a_failure() -> None:
    call, expected = toys.topk(toys.normal(1000), 100, threads=256)
    broken = planted(toys.TOPK, BARRIER, f"if (me != 77) {{ {BARRIER} }}")
    for _ in range(3):
        with pytest.raises(KernelError):
            execute(toys.topk(toys.normal(1000), 100, threads=256, kernel=broken)[0])
        np.testing.assert_array_equal(execute(call)[0], expected)


def _one(kernel: Kernel, *inputs: np.ndarray, n: int = 32, **changed: Any) -> Any:
    """A call with one output of n floats and one simdgroup per 32 of them."""
    size = (n, 1, 1)
    usual: dict[str, Any] = {"grid": size, "threadgroup": size, "output_shapes": [(n,)], "output_dtypes": [F32]}
    return prepare(kernel, inputs, **{**usual, **changed})
