"""Finding and choosing a backend. The toy plug-ins are real: a module and an entry point each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clsa import BackendError, backend
from clsa.backend import BackendInfo, backends, load_backend
from clsa.ops import Device

TOY = """
from clsa.errors import BackendError
from clsa.ops import Device

class Ops:
    def __init__(self, name, device):
        self.name, self.device = name, device

class Backend:
    def __init__(self, name, *devices):
        self.name, self.list = name, [Device(*device) for device in devices]
    def devices(self):
        return self.list
    def open(self, device=None):
        for d in self.list:
            if device in (None, d.name) and d.usable:
                return Ops(self.name, d.name)
        raise BackendError(f"{self.name} has no device {device!r}")
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make `install(name=body, ...)` the only plug-ins: a module and a distribution each."""
    monkeypatch.setattr(backend, "GROUP", "clsa.backends.toys")
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(**bodies: str) -> None:
        for name, body in bodies.items():
            (tmp_path / f"toy_{name}.py").write_text(TOY + body)
            info = tmp_path / f"toy_{name}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toy_{name}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[clsa.backends.toys]\n{name} = toy_{name}:backend\n")
            monkeypatch.delitem(sys.modules, f"toy_{name}", raising=False)
        importlib.invalidate_caches()

    return install


def toy(name: str, *devices: tuple[str, str, bool, str]) -> str:
    return f"backend = Backend({name!r}, *{list(devices)!r})\n"


CPU = ("cpu", "cpu", True, "2 cores")
GPU = ("gpu", "metal", True, "Apple")
CUDA = ("cuda", "nvidia", True, "NVIDIA")
NO_CUDA = ("cuda", "nvidia", False, "no driver was found")


def test_listing_is_best_first(install: Install) -> None:
    install(other=toy("other", CPU), numpy=toy("numpy", CPU), cuda=toy("cuda", NO_CUDA, CPU), mlx=toy("mlx", CPU))
    assert [info.name for info in backends()] == ["mlx", "cuda", "numpy", "other"]
    assert backends()[1] == BackendInfo("cuda", (Device(*NO_CUDA), Device(*CPU)))


@pytest.mark.parametrize(
    ("mlx", "cuda", "expected"),
    [
        ([GPU, CPU], [CUDA, CPU], ("cuda", "cuda")),
        ([GPU, CPU], [NO_CUDA, CPU], ("mlx", "gpu")),
        ([CPU], [NO_CUDA, CPU], ("mlx", "cpu")),
        ([], [NO_CUDA, CPU], ("cuda", "cpu")),
        ([], [NO_CUDA], ("numpy", "cpu")),
    ],
)
def test_auto_takes_nvidia_then_metal_then_cpu(
    install: Install,
    mlx: list[tuple[str, str, bool, str]],
    cuda: list[tuple[str, str, bool, str]],
    expected: tuple[str, str],
) -> None:
    install(numpy=toy("numpy", CPU), mlx=toy("mlx", *mlx), cuda=toy("cuda", *cuda))
    ops, why = load_backend()
    assert (ops.name, ops.device) == expected
    assert why == f"{expected[0]} on {expected[1]} (auto takes NVIDIA, then Metal, then CPU)"


def test_auto_honours_the_device(install: Install) -> None:
    install(numpy=toy("numpy", CPU), mlx=toy("mlx", GPU, CPU))
    ops, _ = load_backend(device="cpu")
    assert (ops.name, ops.device) == ("mlx", "cpu")


def test_a_name_is_taken_as_asked(install: Install) -> None:
    install(numpy=toy("numpy", CPU), mlx=toy("mlx", GPU, CPU), other=toy("other", CPU))
    ops, why = load_backend("other")
    assert (ops.name, why) == ("other", "other on cpu (as asked)")
    with pytest.raises(BackendError, match="numpy has no device 'gpu'"):
        load_backend("numpy", "gpu")


def test_nothing_falls_back(install: Install) -> None:
    broken = "backend.open = lambda device: 1 / 0\n"
    install(numpy=toy("numpy", CPU), mlx=toy("mlx", GPU) + broken)
    for name in ("mlx", "auto"):
        with pytest.raises(BackendError, match="'mlx' cannot run here: ZeroDivisionError: division by zero"):
            load_backend(name)


def test_a_broken_plug_in_does_not_hide_the_others(install: Install) -> None:
    install(
        numpy=toy("numpy", CPU),
        mlx="import no_such_library\n",
        other="raise SyntaxError('of\\nsomeone else')\n",
        third="backend = object()\n",
    )
    assert {info.name: info.error for info in backends()} == {
        "mlx": "ModuleNotFoundError: No module named 'no_such_library'; pip install \"clsa[mlx]\" would help",
        "numpy": None,
        "other": "SyntaxError: of someone else",
        "third": "'toy_third:backend' is not a backend: it has no name and no devices and no open",
    }
    assert load_backend()[0].name == "numpy"
    with pytest.raises(BackendError, match=r"'mlx' cannot run here: .*pip install \"clsa\[mlx\]\""):
        load_backend("mlx")


def test_refusals_say_why(install: Install) -> None:
    with pytest.raises(BackendError, match="install clsa, e"):
        backends()
    with pytest.raises(BackendError, match="install clsa, e"):
        load_backend("numpy")
    install(cuda=toy("cuda", NO_CUDA))
    with pytest.raises(BackendError, match=r"on any device here \(cuda on cuda: no driver was found\)"):
        load_backend()
    with pytest.raises(BackendError, match=r"device 'tpu' here \(no backend lists it\)"):
        load_backend(device="tpu")
    with pytest.raises(BackendError, match="must be 'auto' or one of cuda, got 'tpu'"):
        load_backend("tpu")
    with pytest.raises(BackendError, match="device must be a string"):
        load_backend("cuda", 0)  # type: ignore[arg-type]


def test_the_house_backends_are_registered() -> None:
    assert {"numpy", "mlx", "cuda"} <= {info.name for info in backends()}


@pytest.mark.parametrize("name", ["numpy", "mlx", "cuda"])
def test_house_backends_are_asked_without_an_error(name: str) -> None:
    (info,) = [info for info in backends() if info.name == name]
    assert info.error is None
    assert info.devices and all(device.reason for device in info.devices)
    assert all(device.kind in ("nvidia", "metal", "cpu") for device in info.devices)
