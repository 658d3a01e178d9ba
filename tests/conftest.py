"""What all tests share: skips with a reason, and memory that shows when it was never written."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


@functools.cache
def _missing(marker: str) -> str | None:
    """Why tests with this marker cannot run here; None if they can."""
    if marker == "mlx":
        return None if importlib.util.find_spec("mlx") else "mlx is not installed"
    if marker == "metal":
        if reason := _missing("mlx"):
            return reason
        import mlx.core as mx

        return None if mx.metal.is_available() else "no Apple GPU"
    if marker == "cuda":
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed"
        import torch

        return None if torch.cuda.is_available() else "no NVIDIA GPU"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers():
        if reason := _missing(mark.name):
            pytest.skip(reason)


class _PoisonTorch(MetaPathFinder):
    """Fills torch's uninitialised memory, so that an output element nobody wrote fails a test.

    It acts when torch is first imported, whoever does that, and costs nothing in runs that never import it.
    """

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _poison(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _poison(torch: Any) -> None:
    def poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(allocate)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            out = allocate(*args, **kwargs)
            if out.is_floating_point() or out.is_complex():
                return out.fill_(float("nan"))
            if out.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
                return out.fill_(torch.iinfo(out.dtype).min)
            return out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, poisoned(getattr(owner, name)))


if "torch" in sys.modules:
    _poison(sys.modules["torch"])
else:
    sys.meta_path.insert(0, _PoisonTorch())
