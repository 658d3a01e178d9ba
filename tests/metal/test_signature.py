"""The generated text against MLX's own, byte for byte. Notices when MLX changes its rules."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.metal import toys
from tests.metal.harness import Call, Kernel, prepare

pytestmark = pytest.mark.mlx

ALL_ATTRIBUTES = Kernel(
    name="attributes",
    input_names=["x", "small", "scalar"],
    output_names=["y", "z"],
    header="// no newline at the end of this header\n",
    source="""
    // x_shape x_strides x_ndim small_shape scalar_shape, in a comment: MLX only searches for the text
    dispatch_quadgroups_per_threadgroup grid_origin quadgroup_index_in_threadgroup thread_execution_width
    thread_index_in_quadgroup thread_position_in_grid threadgroups_per_grid threads_per_simdgroup
""",
)
SHAPES_WITHOUT_ATTRIBUTES = Kernel("shapes", ["x"], ["y", "z"], "y[0] = x_shape[0]; z[0] = x_ndim;")
DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "complex64")


def _call(kernel: Kernel, inputs: list[Any], outputs: list[Any], **arguments: Any) -> Call:
    return prepare(
        kernel,
        inputs,
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(8,)] * len(outputs),
        output_dtypes=outputs,
        **arguments,
    )


CALLS: dict[str, Any] = {
    "add f32": lambda: toys.add()[0],
    "add bf16": lambda: toys.add(dtype=toys.BF16)[0],
    "add of few elements": lambda: toys.add(n=7)[0],
    "score f16": lambda: toys.score(dtype=toys.F16)[0],
    "topk": lambda: toys.topk(toys.normal(100), 10)[0],
    "attention bf16": lambda: toys.attention(np.arange(20), dtype=toys.BF16)[0],
    "ring": lambda: toys.ring(25)[0],
    "attributes": lambda: _call(
        ALL_ATTRIBUTES,
        [toys.normal((3, 4)), toys.normal((2, 3)), True],
        [toys.F32, toys.BF16],
        template=[("T", toys.BF16), ("N", 7), ("CAUSAL", True), ("MASKED", False)],
    ),
    "shapes without attributes": lambda: _call(SHAPES_WITHOUT_ATTRIBUTES, [toys.normal(9)], [toys.I32, toys.I32]),
    "atomic outputs": lambda: _call(
        Kernel("hist", ["x"], ["y"], "thread_position_in_grid", atomic_outputs=True), [toys.normal(9)], [toys.U32]
    ),
    **{
        dtype: lambda dtype=dtype: _call(
            Kernel("types", ["x"], ["y"], "y[0] = x[0];"), [np.zeros(9, dtype)], [np.dtype(dtype)]
        )
        for dtype in DTYPES
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_text_is_what_mlx_compiles(name: str) -> None:
    call = CALLS[name]()
    assert call.source.text == _mlx_text(call)


def _mlx_text(call: Call) -> str:
    """What MLX prints for this call with verbose=True, which it does without Metal while exporting a function."""
    import mlx.core as mx

    from tests.metal.harness.on_cpu import to_mlx

    kernel = call.source.kernel
    metal_kernel: Any = mx.fast.metal_kernel
    function = metal_kernel(
        name=kernel.name,
        input_names=list(kernel.input_names),
        output_names=list(kernel.output_names),
        source=kernel.source,
        header=kernel.header,
        atomic_outputs=kernel.atomic_outputs,
    )
    names = {parameter.name: i for i, parameter in enumerate(call.source.parameters)}
    inputs = [to_mlx(call.buffers[names[name]].array) for name in kernel.input_names]
    outputs = [buffer.array for buffer in call.buffers if buffer.writable]

    def run(*arrays: Any) -> Any:
        return function(
            inputs=list(arrays),
            template=[(n, _mlx_dtype(v) if isinstance(v, np.dtype) else v) for n, v in call.source.template] or None,
            grid=call.grid,
            threadgroup=call.threadgroup,
            output_shapes=[array.shape for array in outputs],
            output_dtypes=[_mlx_dtype(array.dtype) for array in outputs],
            verbose=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        printed = _captured(lambda: mx.export_function(str(Path(folder) / "f.mlxfn"), run, *inputs), folder)
    return printed.split("```\n", 1)[1].rsplit("\n```\n", 1)[0]


def _mlx_dtype(dtype: np.dtype) -> Any:
    import mlx.core as mx

    return getattr(mx, {"bool": "bool_"}.get(dtype.name, dtype.name))


def _captured(action: Callable[[], Any], folder: str) -> str:
    """What C++ code writes to file descriptor 1 meanwhile."""
    path = Path(folder) / "stdout"
    saved = os.dup(1)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 1)
            action()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    return path.read_text(encoding="utf-8")
