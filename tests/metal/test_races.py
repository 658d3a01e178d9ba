"""ThreadSanitizer: right kernels are clean, and a missing barrier is named with both lines."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.metal import toys
from tests.metal.harness import Call, Kernel, KernelError, RaceError, prepare
from tests.metal.harness.sanitize import find_races, unavailable
from tests.metal.test_planted_bugs import BARRIER, planted

pytestmark = pytest.mark.races


@pytest.fixture(autouse=True)
def _needs_thread_sanitizer() -> None:
    if reason := unavailable():
        pytest.skip(reason)


SCORES = np.round(toys.normal(300))
CLEAN: dict[str, Callable[[], Call]] = {
    "add": lambda: toys.add(100, threads=64)[0],
    "score": lambda: toys.score(9, threads=128)[0],
    "topk": lambda: toys.topk(SCORES, 40, threads=64)[0],
    "attention": lambda: toys.attention(np.arange(9), threads=64)[0],
}


@pytest.mark.parametrize("name", CLEAN)
def test_right_kernels_are_clean(name: str) -> None:
    find_races(CLEAN[name]())


@pytest.mark.parametrize(
    ("nth", "array", "lines"),
    [(2, "chosen", r"36.*:4[12]"), (3, "totals", r"54.*:57"), (4, "totals", r"5[47].*:5[47]")],
)
def test_missing_barrier_in_topk(nth: int, array: str, lines: str) -> None:
    call = toys.topk(SCORES, 40, threads=64, kernel=planted(toys.TOPK, BARRIER, "", nth))[0]
    with pytest.raises(RaceError, match=rf"threadgroup array '{array}' of threadgroup \(0, 0, 0\).*topk\.body:{lines}"):
        find_races(call)


@pytest.mark.parametrize("nth", [0, 1])
def test_missing_barrier_in_attention(nth: int) -> None:
    call = toys.attention(np.arange(9), threads=64, kernel=planted(toys.ATTENTION, BARRIER, "", nth))[0]
    with pytest.raises(RaceError, match=r"data race: .* of 4 bytes of threadgroup array '(partial|maxima|sums)'"):
        find_races(call)


BODIES = {
    # Between simdgroups of one threadgroup, between threadgroups, and inside one simdgroup.
    "same element": ("y[0] = float(i);", 64, 64, "write of 4 bytes of buffer 'y' at byte 0"),
    "two threadgroups": (
        "y[i] = 1; if (i == 40) y[3] = 1;",
        64,
        32,
        r"at byte 12 by threadgroup \(1, 0, 0\) thread \(8, 0, 0\).* by a thread of an earlier threadgroup",
    ),
    "simd functions order nothing": (
        "y[i] = 1; float s = simd_sum(1.0f); y[i] = s + y[(i + 1) % 32];",
        32,
        32,
        "buffer 'y'",
    ),
    "a barrier without memory": (
        "threadgroup float a[32]; a[i] = 1; threadgroup_barrier(mem_flags::mem_none); y[i] = a[31 - i];",
        32,
        32,
        "threadgroup array 'a'",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_races(name: str) -> None:
    body, threads, size, message = BODIES[name]
    with pytest.raises(RaceError, match=message):
        find_races(_call(body, threads, size))


def test_simdgroup_barrier_orders_the_lanes_of_a_simdgroup() -> None:
    body = "threadgroup float a[32]; a[i] = 1; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[31 - i];"
    find_races(_call(body, 32, 32))


def test_atomics_do_not_race() -> None:
    kernel = Kernel(
        "count",
        [],
        ["y"],
        "atomic_fetch_add_explicit(&y[thread_position_in_grid.x % 3], 1, memory_order_relaxed);",
        atomic_outputs=True,
    )
    find_races(
        prepare(
            kernel,
            [],
            init_value=0,
            grid=(96, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(3,)],
            output_dtypes=[toys.U32],
        )
    )


def test_other_failures_are_reported_as_themselves() -> None:
    with pytest.raises(KernelError, match="write outside buffer 'y'"):
        find_races(_call("if (i == 31) y[i + 1] = 1;", 32, 32))


def _call(body: str, threads: int, size: int) -> Call:
    return prepare(
        Kernel("race", [], ["y"], f"uint i = thread_position_in_grid.x; {body}"),
        [],
        grid=(threads, 1, 1),
        threadgroup=(size, 1, 1),
        output_shapes=[(threads,)],
        output_dtypes=[toys.F32],
    )
