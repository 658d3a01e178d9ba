"""A kernel with its arrays and its grid: what one launch needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.metal.harness.errors import KernelError
from tests.metal.harness.signature import TYPE_NAMES, Kernel, Parameter, Source, generate

Size = tuple[int, int, int]

MAX_BUFFERS = 31


@dataclass(frozen=True)
class Buffer:
    """One argument of the kernel. Writable ones are its outputs."""

    name: str
    array: np.ndarray
    writable: bool


@dataclass(frozen=True)
class Call:
    """Checked against Metal's limits and ready to run, any number of times."""

    source: Source
    buffers: list[Buffer]
    grid: Size
    threadgroup: Size
    initialised: bool  # the outputs hold `init_value`


def prepare(
    kernel: Kernel,
    inputs: Sequence[Any],
    *,
    grid: Size,
    threadgroup: Size,
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[Any],
    template: Sequence[tuple[str, Any]] = (),
    init_value: float | None = None,
    max_threads: int = 1024,
) -> Call:
    """Bind a kernel to its arguments, as a call of an MLX kernel does.

    Args:
        kernel: name, body and header.
        inputs: arrays, or Python scalars, which become 0-dim arrays.
        grid: total threads along x, y, z.
        threadgroup: threads of one threadgroup along x, y, z; those at the edge of the grid may be smaller.
        output_shapes, output_dtypes: one each per output; dtypes of NumPy or ml_dtypes.
        template: names with a bool, an int or a dtype.
        init_value: fills every output before the launch. Without it each element must be written.
        max_threads: the pipeline's limit for threads of a threadgroup; 1024 at most, less with many registers.
    Raises:
        KernelError: the arguments do not fit the kernel, or break a limit of Metal.
    """
    arrays = [_array(value, kernel.ensure_row_contiguous) for value in inputs]
    dtypes = [np.dtype(dtype) for dtype in output_dtypes]
    _check_counts(kernel, arrays, output_shapes, dtypes)
    _check_sizes(kernel, grid, threadgroup, max_threads)
    values = [(name, value if isinstance(value, bool | int) else np.dtype(value)) for name, value in template]
    source = generate(kernel, arrays, dtypes, values)
    _check_buffers(source)
    outputs = [np.full(tuple(shape), init_value or 0.0).astype(dtype) for shape, dtype in zip(output_shapes, dtypes)]
    buffers = [_buffer(parameter, arrays, outputs) for parameter in source.parameters]
    x, y, z = (min(pair) for pair in zip(threadgroup, grid))
    return Call(source, buffers, grid, (x, y, z), initialised=init_value is not None)


def _array(value: Any, ensure_row_contiguous: bool) -> np.ndarray:
    if isinstance(value, bool):
        return np.asarray(value)
    if isinstance(value, int | float):
        return np.asarray(value, np.int32 if isinstance(value, int) else np.float32)
    return np.asarray(value, order="C" if ensure_row_contiguous else None)


def _buffer(parameter: Parameter, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Buffer:
    if parameter.origin == "output":
        return Buffer(parameter.name, outputs[parameter.index], writable=True)
    array = inputs[parameter.index]
    if parameter.origin == "shape":
        array = np.array(array.shape, np.int32)
    elif parameter.origin == "strides":
        array = np.array([stride // array.itemsize for stride in array.strides], np.int64)
    elif parameter.origin == "ndim":
        array = np.array(array.ndim, np.int32)
    return Buffer(parameter.name, _memory(array), writable=False)


def _memory(array: np.ndarray) -> np.ndarray:
    """The array if it lies row by row, else the elements from its first to its last in memory."""
    if array.flags.c_contiguous:
        return array
    if min(array.strides) < 0:
        raise KernelError("inputs that run backwards in memory are not supported; copy the array")
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides))
    return np.lib.stride_tricks.as_strided(array, (last // array.itemsize + 1,), (array.itemsize,), writeable=False)


def _check_counts(
    kernel: Kernel, inputs: list[np.ndarray], shapes: Sequence[Sequence[int]], dtypes: list[np.dtype]
) -> None:
    for what, expected, got in (
        ("inputs", kernel.input_names, inputs),
        ("output_shapes", kernel.output_names, shapes),
        ("output_dtypes", kernel.output_names, dtypes),
    ):
        if len(expected) != len(got):
            raise KernelError(f"{kernel.name}: expected {len(expected)} {what} ({', '.join(expected)}), got {len(got)}")
    for name, dtype in [*zip(kernel.input_names, (x.dtype for x in inputs)), *zip(kernel.output_names, dtypes)]:
        if dtype not in TYPE_NAMES:
            raise KernelError(f"{kernel.name}: '{name}' has dtype {dtype}, which MLX does not have")


def _check_buffers(source: Source) -> None:
    names = [parameter.name for parameter in source.parameters]
    if len(names) > MAX_BUFFERS:
        raise KernelError(
            f"{source.kernel.name} has {len(names)} buffers ({', '.join(names)}); Metal binds at most {MAX_BUFFERS}"
        )


def _check_sizes(kernel: Kernel, grid: Size, threadgroup: Size, max_threads: int) -> None:
    if any(size < 1 for size in (*grid, *threadgroup)):
        raise KernelError(f"{kernel.name}: grid {grid} and threadgroup {threadgroup} must be 1 or more on every axis")
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if threads > max_threads:
        raise KernelError(
            f"{kernel.name}: thread group size ({threads}) is greater than the maximum allowed threads per"
            f" threadgroup ({max_threads})"
        )
