"""Elementwise functions as one kernel on Metal."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import mlx.core as mx

F = TypeVar("F", bound=Callable[..., Any])


def on_gpu() -> bool:
    return mx.default_device() == mx.Device(mx.gpu)


def fused(function: F) -> F:
    """Compile `function` on Metal. On CPU it runs as written: there MLX would need a C++ compiler at run time."""
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def call(*arrays: mx.array) -> Any:
        return (compiled if on_gpu() else function)(*arrays)

    return call  # type: ignore[return-value]
