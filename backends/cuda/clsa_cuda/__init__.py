"""The backend "cuda": torch on NVIDIA GPUs, and the same torch code on the CPU.

Importing this package does not import torch; asking for devices or opening one does.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from clsa.config import ModelConfig
from clsa.errors import BackendError
from clsa.ops import Device

if TYPE_CHECKING:
    from clsa_cuda.bench_op_peers import FlashInferPeer, TorchPeer
    from clsa_cuda.bench_peers import Transformers
    from clsa_cuda.ops import TorchOps
    from clsa_cuda.trainer import TorchTrainer

MIN_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 arithmetic


class CudaBackend:
    name = "cuda"

    def devices(self) -> list[Device]:
        """Each NVIDIA GPU that torch sees ("cuda:0", ...) and "cpu"; what cannot be used says why. Never raises."""
        if reason := _why_no_torch():
            return [Device("cuda", "nvidia", False, reason), Device("cpu", "cpu", False, reason)]
        return [*_gpus(), _cpu()]

    def open(self, device: str | None = None) -> TorchOps:
        """The ops on "cpu", "cuda" (the first usable GPU) or "cuda:N"; None takes the best usable device."""
        if device is not None and not (isinstance(device, str) and re.fullmatch(r"cpu|cuda(:\d{1,3})?", device)):
            raise BackendError(f"device of backend 'cuda' must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
        known = self.devices()
        wanted = [d for d in known if device in (None, d.name) or (device == "cuda" and d.kind == "nvidia")]
        usable = [d for d in wanted if d.usable]
        if not usable:
            why = "; ".join(f"{d.name}: {d.reason}" for d in wanted)
            why = why or f"there is none of that name, only {', '.join(d.name for d in known)}"
            raise BackendError(f"backend 'cuda' cannot run on {device or 'any device'} here ({why})")
        if usable[0].kind == "cpu":
            from clsa_cuda.ops import TorchOps

            return TorchOps(usable[0].name)
        if importlib.util.find_spec("triton") is None:
            raise BackendError("backend 'cuda' needs triton on a GPU; pip install \"clsa[cuda]\" would help")
        from clsa_cuda.kernels.ops import KernelOps

        return KernelOps(usable[0].name)

    def open_trainer(self, device: str | None = None, dtype: str = "bfloat16") -> TorchTrainer:
        """A `clsa.train.trainer.Trainer` on "cuda", "cuda:N" or "cpu"; None takes the GPU if there is one."""
        if reason := _why_no_torch():
            raise BackendError(f"backend 'cuda' cannot train here: {reason}")
        from clsa_cuda.trainer import open_trainer

        return open_trainer(device, dtype)

    def bench_timer(self, ops: TorchOps) -> Callable[..., tuple[str, list[float]]] | None:
        """For `clsa bench`: times work on a GPU by its own clock; None on the CPU."""
        from clsa_cuda.bench_timer import device_timer

        return device_timer(ops)

    def bench_peers(self, config: ModelConfig, dtype: str, device: str | None) -> list[Transformers]:
        """transformers' dense model of these sizes for `clsa bench`, if it is installed."""
        from clsa_cuda.bench_peers import bench_peers

        return bench_peers(config, dtype, device)

    def bench_op_peers(self, dtype: str, device: str | None) -> list[TorchPeer | FlashInferPeer]:
        """torch's own ops for `clsa bench`, and FlashInfer's if it is installed."""
        from clsa_cuda.bench_op_peers import bench_op_peers

        return bench_op_peers(dtype, device)

    def bench_release_cache(self) -> None:
        """For `clsa bench`: torch cuts what it keeps of a large array into small ones, and then it has none left."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _why_no_torch() -> str | None:
    try:
        if importlib.util.find_spec("torch") is None:
            return 'torch is not installed; pip install "clsa[cuda]" would help'
        import torch  # noqa: F401
    except Exception as error:
        return f"torch cannot be imported ({_one_line(error)}); reinstalling it would help"
    return None


def _cpu() -> Device:
    import torch

    return Device("cpu", "cpu", True, f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def _gpus() -> list[Device]:
    import torch

    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA; a CUDA build from pytorch.org would help"
        return [Device("cuda", "nvidia", False, reason)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about an old driver, then raises with the reason
            torch.cuda.init()
            count = torch.cuda.device_count()
    except Exception as error:
        return [Device("cuda", "nvidia", False, _without_driver(error))]
    if count == 0:
        return [Device("cuda", "nvidia", False, "no NVIDIA GPU is visible; check CUDA_VISIBLE_DEVICES")]
    return [_gpu(i) for i in range(count)]


def _gpu(index: int) -> Device:
    import torch

    name = f"cuda:{index}"
    try:
        properties = torch.cuda.get_device_properties(index)
    except Exception as error:
        return Device(name, "nvidia", False, f"torch cannot use it: {_one_line(error)}")
    capability = (properties.major, properties.minor)
    text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {_dotted(capability)}"
    if capability < MIN_CAPABILITY:
        needed = f"bfloat16 needs {_dotted(MIN_CAPABILITY)} (Ampere) or later; device 'cpu' would work"
        return Device(name, "nvidia", False, f"{text}: {needed}")
    return Device(name, "nvidia", True, text)


def _without_driver(error: Exception) -> str:
    text = _one_line(error)
    if "too old" in text:
        return f"the NVIDIA driver is too old for this torch; updating the driver would help ({text})"
    if "no NVIDIA driver" in text or "No CUDA GPUs" in text:
        return "no NVIDIA GPU or no driver for it; device 'cpu' would work"
    return f"CUDA does not start: {text}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


backend = CudaBackend()
