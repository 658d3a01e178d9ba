"""The Triton kernels on the GPU if there is one, and in Triton's interpreter on the CPU otherwise.

The interpreter multiplies bfloat16 tiles wrongly (triton 3.6), so bfloat16 is tested on the GPU only.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest


def _let_numpy_2_4_count() -> None:
    """The interpreter (triton 3.6) makes loop bounds from arrays of one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


_MISSING = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]

if not _MISSING:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
        _let_numpy_2_4_count()
    DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
collect_ignore_glob = ["test_*.py"] if _MISSING else []


@pytest.fixture(scope="session")
def ops() -> Iterator[object]:
    """The plain ops of the device the kernels run on: arrays, memories and windows."""
    from clsa_cuda.ops import TorchOps

    yield TorchOps(DEVICE)


@pytest.fixture(params=["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.cuda)])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)
