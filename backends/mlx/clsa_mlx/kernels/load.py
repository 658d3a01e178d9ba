"""From the text of a kernel to a function that launches it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import mlx.core as mx

_FOLDER = Path(__file__).parent


@cache
def load(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    headers: tuple[str, ...] = (),
    *,
    atomic: bool = False,
    strided: bool = False,
) -> Callable[..., list[mx.array]]:
    """`mx.fast.metal_kernel` of `<name>.metal` behind `<header>.h.metal`, made once per process.

    Args: names of the buffers as the kernel uses them; `atomic` makes all outputs atomic; a `strided` kernel takes
    inputs as they lie in memory, where for others MLX copies what does not lie row by row.
    """
    kernel = mx.fast.metal_kernel(
        name=f"clsa_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=_text(f"{name}.metal"),
        header="".join(_text(f"{header}.h.metal") for header in headers),
        ensure_row_contiguous=not strided,
        atomic_outputs=atomic,
    )
    return cast(Callable[..., list[mx.array]], kernel)


@cache
def _text(file: str) -> str:
    return (_FOLDER / file).read_text(encoding="utf-8")
