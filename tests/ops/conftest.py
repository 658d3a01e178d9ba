"""Fixtures of the op suite: every backend on every kind of device, in every dtype, against `clsa.spec`."""

from __future__ import annotations

import functools
import importlib

import pytest

from clsa.config import DTYPES
from clsa.ops import Backend, Ops

_KINDS = [
    pytest.param(("cuda", "cpu"), id="cuda-cpu"),
    pytest.param(("cuda", "nvidia"), id="cuda-gpu", marks=pytest.mark.cuda),
    pytest.param(("mlx", "cpu"), id="mlx-cpu", marks=pytest.mark.mlx),
    pytest.param(("mlx", "metal"), id="mlx-metal", marks=pytest.mark.metal),
]


@functools.cache
def _open(name: str, kind: str) -> Ops | str:
    """The ops, or why they cannot run here."""
    backend: Backend = importlib.import_module(f"clsa_{name}").backend
    devices = [device for device in backend.devices() if device.kind == kind]
    usable = [device.name for device in devices if device.usable]
    if not usable:
        return "; ".join(f"{device.name}: {device.reason}" for device in devices) or f"no {kind} device"
    if kind == "cpu" and name == "cuda":
        import torch

        torch.set_num_threads(1)  # the arrays are tiny: on a busy machine, waking a second thread costs far more
    return backend.open(usable[0])


@pytest.fixture(scope="session", params=_KINDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    """One backend on one kind of device."""
    opened = _open(*request.param)
    if isinstance(opened, str):
        pytest.skip(opened)
    return opened


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)
