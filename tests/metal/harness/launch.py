"""Running a kernel on NumPy arrays, in this process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tests.metal.harness.call import Call, prepare
from tests.metal.harness.compile import build_kernel, build_runtime, line_of
from tests.metal.harness.errors import KernelError
from tests.metal.harness.signature import Kernel
from tests.metal.harness.translate import to_cpp

Order = Literal["forward", "reverse", "random"]
Place = Literal["end", "start"]
ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")
PLACES: tuple[Place, ...] = ("end", "start")

POISONS = (0xCB, 0x35)  # bytes of memory that nobody has written; as floats -2.7e7 and 6.8e-7


def run(
    kernel: Kernel, inputs: Sequence[Any], *, order: Order = "forward", place: Place = "end", **arguments: Any
) -> list[np.ndarray]:
    """Run a kernel once and return its outputs: `execute(prepare(kernel, inputs, **arguments))`."""
    return execute(prepare(kernel, inputs, **arguments), order=order, place=place)


def execute(
    call: Call, *, order: Order = "forward", place: Place = "end", seed: int = 0, timeout: float = 20.0
) -> list[np.ndarray]:
    """Run the whole grid and return the outputs.

    Args:
        call: from `prepare`.
        order: in which lanes, simdgroups and threadgroups take turns; "random" also switches at atomics.
        place: which end of each buffer and threadgroup array touches a guard, exact to the byte.
        seed: of the random order.
        timeout: seconds of processor time.
    Raises:
        CompileError: the kernel is not valid.
        KernelError: it did something undefined; the message names the place.
    """
    library = str(build_kernel(to_cpp(call.source)))
    launch = functools.partial(_launch, call, library, order=order, place=place, seed=seed, timeout=timeout)
    outputs = launch(poison=POISONS[0])
    if not call.initialised:
        suspects = [_holds_poison(array, POISONS[0]) for array in outputs]
        if any(suspect.any() for suspect in suspects):  # poison, or a value that looks like it?
            again = launch(poison=POISONS[1])
            _check_written(call, [a & _holds_poison(b, POISONS[1]) for a, b in zip(suspects, again)])
    return outputs


def check(call: Call, *expected: np.ndarray, rtol: float = 0.0, atol: float = 0.0, **options: Any) -> None:
    """Run in every order and with both placements, and hold the outputs against a specification.

    Args:
        call: from `prepare`.
        expected: one array per output; a NaN equals a NaN.
        rtol, atol: |out - expected| <= atol + rtol * |expected|; zero for exact equality.
        options: for `execute`.
    Raises:
        KernelError: a run failed, or an element differs; the message names order, output and element.
    """
    names = [buffer.name for buffer in call.buffers if buffer.writable]
    for order in ORDERS:
        for place in PLACES:
            outputs = execute(call, order=order, place=place, **options)
            for name, output, wanted in zip(names, outputs, expected, strict=True):
                _compare(
                    f"{call.source.kernel.name}: output '{name}' in {order} order with buffers at the {place}",
                    output,
                    np.asarray(wanted),
                    rtol,
                    atol,
                )


def _compare(what: str, output: np.ndarray, expected: np.ndarray, rtol: float, atol: float) -> None:
    if output.shape != expected.shape:
        raise KernelError(f"{what} has shape {output.shape}, expected {expected.shape}")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        output, expected = output.astype(np.float64), expected.astype(np.float64)
    wrong = ~np.isclose(output, expected, rtol=rtol, atol=atol, equal_nan=True)
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise KernelError(
            f"{what} has {int(wrong.sum())} of {wrong.size} elements wrong, the first at {first}:"
            f" {output[first]}, expected {expected[first]}"
        )


def _holds_poison(array: np.ndarray, poison: int) -> np.ndarray:
    """Which elements have only poison bytes. Bool array of the shape of `array`."""
    raw = array.reshape(-1).view(np.uint8).reshape(array.size, array.itemsize)
    return (raw == poison).all(axis=1).reshape(array.shape)


def _check_written(call: Call, unwritten: list[np.ndarray]) -> None:
    outputs = (buffer for buffer in call.buffers if buffer.writable)
    for buffer, missing in zip(outputs, unwritten):
        if missing.any():
            first = tuple(int(i) for i in np.argwhere(missing)[0])
            raise KernelError(
                f"{call.source.kernel.name}: output '{buffer.name}' has {int(missing.sum())} of {missing.size}"
                f" elements that no thread wrote, or that were copied from memory that none wrote, the first at {first}"
            )


class _Triple(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint32) for axis in "xyz"]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("item_bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
    ]


class _LaunchStruct(ctypes.Structure):
    """runtime::Launch."""

    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_int32),
        ("grid", _Triple),
        ("threadgroup", _Triple),
        ("order", ctypes.c_int32),
        ("place", ctypes.c_int32),
        ("poison", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
        ("error", ctypes.c_char * 2048),
        ("fault_module", ctypes.c_char * 512),
        ("fault_offset", ctypes.c_uint64),
    ]


@functools.cache
def _runtime() -> Any:
    # RTLD_GLOBAL: kernels find the runtime's functions in it.
    launch = ctypes.CDLL(str(build_runtime()), mode=ctypes.RTLD_GLOBAL).runtime_launch
    launch.argtypes = [ctypes.POINTER(_LaunchStruct)]
    launch.restype = None
    return launch


@functools.cache
def _entry(library: str) -> int:
    return ctypes.cast(ctypes.CDLL(library).kernel_entry, ctypes.c_void_p).value or 0


def _launch(
    call: Call, library: str, *, order: Order, place: Place, seed: int, timeout: float, poison: int
) -> list[np.ndarray]:
    """One run with fresh outputs, filled with poison unless the call has an initial value."""
    runtime = _runtime()
    arrays = [buffer.array.copy() if buffer.writable else buffer.array for buffer in call.buffers]
    outputs = [array for array, buffer in zip(arrays, call.buffers) if buffer.writable]
    if not call.initialised:
        for output in outputs:
            output.reshape(-1).view(np.uint8)[:] = poison
    buffers = (_Buffer * len(arrays))(
        *(
            _Buffer(buffer.name.encode(), array.ctypes.data, array.nbytes, array.itemsize, buffer.writable)
            for buffer, array in zip(call.buffers, arrays)
        )
    )
    launch = _LaunchStruct(
        entry=_entry(library),
        buffers=buffers,
        buffer_count=len(arrays),
        grid=call.grid,
        threadgroup=call.threadgroup,
        order=ORDERS.index(order),
        place=PLACES.index(place),
        poison=poison,
        seed=seed,
        seconds=timeout,
    )
    runtime(ctypes.byref(launch))
    if launch.error:
        line = line_of(launch.fault_module.decode(), launch.fault_offset)
        raise KernelError(f"{call.source.kernel.name}: {launch.error.decode()}" + (f", {line}" if line else ""))
    return outputs
