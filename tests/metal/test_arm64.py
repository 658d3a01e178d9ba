"""The arm64 runtime on an x86-64 machine: cross-compiled, run by qemu. Natively on arm64 all other tests cover it."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from tests.metal import toys
from tests.metal.harness import Kernel, prepare
from tests.metal.harness.compile import build_program
from tests.metal.harness.program import run_program
from tests.metal.harness.translate import to_cpp

CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.skipif(not CROSS_COMPILER, reason="no aarch64-linux-gnu-g++"),
    pytest.mark.skipif(not EMULATOR, reason="no qemu-aarch64"),
]


def command(source: str) -> list[str]:
    program = build_program(source, races=False, cross_compiler=CROSS_COMPILER)
    return [EMULATOR or "", "-L", os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu"), str(program)]


def test_topk_with_barriers_and_simd_functions() -> None:
    call, expected = toys.topk(np.round(toys.normal(700)), 50, threads=128)
    for order in ("forward", "reverse", "random"):
        done, outputs = run_program(command(to_cpp(call.source)), call, order=order)
        assert done.returncode == 0, done.stdout + done.stderr
        np.testing.assert_array_equal(outputs[0], expected)


def test_a_fault_is_a_message() -> None:
    kernel = Kernel("bad", [], ["y"], "uint i = thread_position_in_grid.x; y[i + 1] = 1;")
    call = prepare(kernel, [], grid=(32, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(32,)], output_dtypes=[toys.F32])
    done, _ = run_program(command(to_cpp(call.source)), call)
    assert done.returncode == 1
    assert "outside buffer 'y' (128 bytes) at byte 128, element 32; threadgroup (0, 0, 0), thread (31" in done.stdout
