"""Custom kernels of MLX on a machine without Metal: the harness in the place of `mx.fast.metal_kernel`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ml_dtypes
import mlx.core as mx
import numpy as np

from tests.metal.harness.call import Call, prepare
from tests.metal.harness.launch import Order, Place, execute
from tests.metal.harness.signature import Kernel

Watch = Callable[[Call, list[np.ndarray]], None]


@contextmanager
def metal_on_cpu(order: Order = "forward", place: Place = "end", watch: Watch | None = None) -> Iterator[None]:
    """Run custom kernels in the harness, with `mx.array` in and out, while this is entered.

    Import or build the kernels inside: a module that keeps the result of `mx.fast.metal_kernel` keeps what it got.
    Kernels do not run inside `mx.compile` or function transformations, because they need values.

    Args:
        order, place: as for `execute`.
        watch: called with each launch and its outputs, for example to check its types or to look for races.
    """

    def metal_kernel(
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: dict[str, Any] | None = None,
    ) -> Callable[..., list[mx.array]]:
        kernel = Kernel(
            name, list(input_names), list(output_names), source, header, ensure_row_contiguous, atomic_outputs
        )
        return _Callable(kernel, order, place, watch)

    with (
        mock.patch.object(mx.fast, "metal_kernel", metal_kernel),
        mock.patch.object(mx.metal, "is_available", lambda: True),
    ):
        yield


class _Callable:
    """What `mx.fast.metal_kernel` returns, with the parameters that MLX gives it."""

    def __init__(self, kernel: Kernel, order: Order, place: Place, watch: Watch | None) -> None:
        self._kernel, self._order, self._place, self._watch = kernel, order, place, watch

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        call = prepare(
            self._kernel,
            [to_numpy(value) if isinstance(value, mx.array) else value for value in inputs],
            grid=tuple(grid),  # type: ignore[arg-type]
            threadgroup=tuple(threadgroup),  # type: ignore[arg-type]
            output_shapes=output_shapes,
            output_dtypes=[numpy_dtype(dtype) for dtype in output_dtypes],
            template=[
                (name, numpy_dtype(value) if isinstance(value, mx.Dtype) else value) for name, value in template or ()
            ],
            init_value=init_value,
        )
        if verbose:
            print(call.source.text)
        outputs = execute(call, order=self._order, place=self._place)
        if self._watch is not None:
            self._watch(call, outputs)
        return [to_mlx(output) for output in outputs]


def numpy_dtype(dtype: mx.Dtype) -> np.dtype:
    """The NumPy dtype of an MLX dtype."""
    if dtype == mx.bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(str(dtype).removeprefix("mlx.core.").removesuffix("_"))


def to_numpy(array: mx.array) -> np.ndarray:
    """The same memory, with the same strides."""
    if array.dtype == mx.bfloat16:  # the buffer protocol has no bfloat16
        return np.asarray(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.asarray(array)


def to_mlx(array: np.ndarray) -> mx.array:
    """A copy with the same bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)
