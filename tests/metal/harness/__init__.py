"""Runs the very text of MLX custom Metal kernels on Linux. See tests/metal/README.md."""

from tests.metal.harness.call import Call, prepare
from tests.metal.harness.errors import CompileError, KernelError, RaceError
from tests.metal.harness.launch import ORDERS, PLACES, check, execute, run
from tests.metal.harness.signature import Kernel

__all__ = [
    "ORDERS",
    "PLACES",
    "Call",
    "CompileError",
    "Kernel",
    "KernelError",
    "RaceError",
    "check",
    "execute",
    "prepare",
    "run",
]
