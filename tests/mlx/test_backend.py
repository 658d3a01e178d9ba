"""Which devices MLX offers, and what it says when it cannot."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from clsa import BackendError
from clsa_mlx import backend as mlx
from clsa_mlx.device import MlxBackend


def _version(found: str | None) -> Callable[[str], str]:
    def version(_: str) -> str:
        if found is None:
            raise PackageNotFoundError("mlx")
        return found

    return version


def _without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def failing(name: str, *args: Any) -> Any:
        if name.startswith("mlx"):
            raise ImportError("libmlx.so: cannot open\nshared object file")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", failing)


@pytest.mark.parametrize(
    ("found", "broken", "reason"),
    [
        (None, False, "mlx is not installed; pip install "),
        ("0.30.9", False, "mlx 0.30.9 is older than 0.31; pip install "),
        ("0.9", False, "mlx 0.9 is older than 0.31; pip install "),
        ("0.32.4", True, "cannot be imported (libmlx.so: cannot open shared object file); pip install "),
    ],
)
def test_reasons_say_what_would_help(
    found: str | None, broken: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clsa_mlx.device.version", _version(found))
    if broken:
        _without_library(monkeypatch)
    devices = mlx.devices()
    assert [(d.name, d.kind, d.usable) for d in devices] == [("gpu", "metal", False), ("cpu", "cpu", False)]
    assert all(reason in d.reason for d in devices)
    for device in (None, "cpu", "gpu"):
        with pytest.raises(BackendError, match=r"backend .mlx. cannot run on .*pip install"):
            mlx.open(device)


@pytest.mark.mlx
def test_the_cpu_is_always_offered() -> None:
    cpu = mlx.devices()[1]
    assert (cpu.name, cpu.kind, cpu.usable) == ("cpu", "cpu", True)
    ops = mlx.open("cpu")
    assert (ops.name, ops.device) == ("mlx", "cpu (MLX)")
    assert os.environ["MLX_ENABLE_TF32"] == "0"


@pytest.mark.mlx
def test_unusable_and_unknown_devices_are_refused() -> None:
    import mlx.core as mx

    with pytest.raises(BackendError, match="has devices gpu, cpu, got 'cuda'"):
        mlx.open("cuda")
    if not mx.metal.is_available():
        with pytest.raises(BackendError, match="cannot run on 'gpu': no Metal here"):
            mlx.open("gpu")
        assert mlx.open().device == "cpu (MLX)"


@pytest.mark.metal
def test_the_gpu_comes_first_and_has_a_name() -> None:
    gpu = mlx.devices()[0]
    ops = mlx.open()
    assert gpu.usable and ops.device == f"{gpu.reason} GPU (Metal)"
    stats = ops.memory_stats()
    assert 0 < stats["free"] <= stats["total"]


def test_importing_the_package_does_not_import_mlx() -> None:
    code = "import sys, clsa_mlx; assert clsa_mlx.backend.name == 'mlx'; assert 'mlx' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_it_is_what_the_entry_point_names() -> None:
    assert isinstance(mlx, MlxBackend)
