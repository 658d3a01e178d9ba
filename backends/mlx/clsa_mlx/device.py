"""Which devices MLX can use here, and the choice of one."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, cast

from clsa.config import ModelConfig
from clsa.errors import BackendError
from clsa.ops import Device, Ops

if TYPE_CHECKING:
    from clsa_mlx.bench_peers import MlxLm

_OLDEST = (0, 31)  # int64 partition, gather_mm on CPU and device_info as the ops use them
_INSTALL = "pip install 'mlx[cpu]>=0.31'" if sys.platform == "linux" else "pip install 'mlx>=0.31'"


class MlxBackend:
    name = "mlx"

    def devices(self) -> list[Device]:
        """The devices "gpu" and "cpu", usable or not; never raises."""
        if reason := _why_not():
            return [Device("gpu", "metal", False, reason), Device("cpu", "cpu", False, reason)]
        import mlx.core as mx

        if mx.metal.is_available():
            gpu = Device("gpu", "metal", True, _chip())
        else:
            gpu = Device("gpu", "metal", False, "no Metal here; it takes a Mac with Apple silicon and an arm64 Python")
        return [gpu, Device("cpu", "cpu", True, f"MLX {version('mlx')} on the CPU")]

    def open(self, device: str | None = None) -> Ops:
        """The ops on that device. MLX has one default device per process, and this sets it.

        Raises BackendError on an unknown device, or one that cannot be used here.
        """
        # On chips with TF32 matrix units MLX would round float32 products to 10 bits unless told otherwise.
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
        offers = {offer.name: offer for offer in self.devices()}
        if device is None:
            device = next((offer.name for offer in offers.values() if offer.usable), "cpu")
        if device not in offers:
            raise BackendError(f"backend 'mlx' has devices {', '.join(offers)}, got {device!r}")
        if not offers[device].usable:
            raise BackendError(f"backend 'mlx' cannot run on {device!r}: {offers[device].reason}")
        import mlx.core as mx

        from clsa_mlx import kernels, ops

        mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
        if device == "gpu":
            _set_limits()
        kernels.enabled = device == "gpu"
        ops.device = f"{_chip()} GPU (Metal)" if device == "gpu" else "cpu (MLX)"
        return cast(Ops, ops)

    def bench_peers(self, config: ModelConfig, dtype: str, device: str | None) -> list[MlxLm]:
        """mlx-lm's dense model of these sizes for `clsa bench`, if it is installed."""
        from clsa_mlx.bench_peers import bench_peers

        return bench_peers(config, dtype, device)


def _set_limits() -> None:
    """What is allocated stays resident, so that no step waits for pages; of what is freed an eighth is kept."""
    import mlx.core as mx

    info = mx.device_info(mx.gpu)
    limit = int(info.get("max_recommended_working_set_size", int(info["memory_size"]) // 2))
    mx.set_wired_limit(limit)  # without effect before macOS 15
    mx.set_cache_limit(limit // 8)


def _why_not() -> str | None:
    """Why MLX cannot be used at all and what would help; None if it can."""
    try:
        found = version("mlx")
    except PackageNotFoundError:
        return f"mlx is not installed; {_INSTALL} would help"
    if tuple(int(part) for part in found.split(".")[:2] if part.isdigit()) < _OLDEST:
        return f"mlx {found} is older than 0.31; {_INSTALL} would help"
    try:
        import mlx.core  # noqa: F401
    except Exception as error:  # a missing shared library is an ImportError or OSError, by platform
        return f"mlx {found} cannot be imported ({' '.join(str(error).split())}); {_INSTALL} would help"
    return None


def _chip() -> str:
    import mlx.core as mx

    return str(mx.device_info(mx.gpu).get("device_name", "Apple"))


backend = MlxBackend()
