"""`TorchOps`: every function of `clsa.ops.Ops` on one torch device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from clsa.config import FP8, MODEL_DTYPE, MemoryDtypes
from clsa.hostmemory import host_memory_stats
from clsa.ops import Compute, Memory, QuantizedWeight, StepSize, Window
from clsa_cuda import plain, state
from clsa_cuda.attention import MAX_TEMPORARY_BYTES
from clsa_cuda.blocks import Blocks
from clsa_cuda.dense_attention import dense_attention
from clsa_cuda.gather_attention import gather_attention
from clsa_cuda.recorder import Recorder
from clsa_cuda.sample import sample
from clsa_cuda.select import select, take_selection
from clsa_cuda.sliding_attention import sliding_attention
from clsa_cuda.transfer import Layout, start_fetch

FLOAT8_CAPABILITY = (8, 9)  # Ada: the first that converts E4M3
_PINNED_BYTES = 1 << 16  # a step's integers; the few large arrays (weights) are not worth page-locking


def _exact_matmul() -> None:
    """Ask torch for matrix products as precise as the protocol promises, in the whole process.

    TF32 keeps 10 bits of a float32, which changes what the index selects; the 16-bit settings let a product that is
    split over K be summed in 16 bits.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


class TorchOps(Blocks):
    """An `Ops` bound to a device ("cpu" or "cuda:N"). Arrays are `torch.Tensor`."""

    name = "cuda"
    temporary_bytes = 4 * MAX_TEMPORARY_BYTES
    records_rest = True
    keeps_quantized = False

    def __init__(self, device: str) -> None:
        _exact_matmul()
        self._device = torch.device(device)
        self.no_fp8: Mapping[str, str] = _no_fp8(self._device)
        if self._device.type == "cuda":
            self.step_size = StepSize(256, 8192, min_prompt_tokens=2048)
            self.device = f"{torch.cuda.get_device_name(self._device)} ({device})"
        else:
            self.step_size = StepSize(32, 2048)
            self.device = f"cpu (torch {torch.__version__}, {torch.get_num_threads()} threads)"

    def _enter(self) -> None:
        """Make this GPU the thread's current one, on which kernels are launched: whatever is computed, by any thread,
        begins with moving its arrays. A program with torch of its own on another GPU should name devices."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def asarray(self, x: np.ndarray, dtype: str | None = None) -> Tensor:
        self._enter()
        tensor = _host_tensor(x)
        if dtype is not None:
            tensor = tensor.to(plain.DTYPES[dtype])
        if self._device.type == "cuda" and tensor.nbytes <= _PINNED_BYTES:
            return tensor.pin_memory().to(self._device, non_blocking=True)  # pageable memory would wait
        return tensor.to(self._device)

    def quantized_weight(self, host: QuantizedWeight, dtype: str) -> Tensor:
        scales, biases = self.asarray(host.scales, dtype), self.asarray(host.biases, dtype)
        packed = self.asarray(np.ascontiguousarray(host.packed).view(np.uint8))
        return plain.dequantize(QuantizedWeight(packed, scales, biases, host.group_size, host.bits))

    def asarrays(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        if self._device.type == "cpu":
            return [self.asarray(x) for x in arrays]
        self._enter()
        layout = Layout(arrays)
        return layout.views(layout.pack(arrays).to(self._device, non_blocking=True))

    def fetch(self, arrays: Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
        if self._device.type == "cpu":
            return lambda: [self.to_numpy(x) for x in arrays]
        return start_fetch(arrays, self._device)

    def record(self, compute: Compute) -> Compute | None:
        return None if self._device.type == "cpu" else Recorder(compute, self._device)

    def to_numpy(self, x: Tensor) -> np.ndarray:
        x = x.detach()
        is_known = x.dtype not in (torch.bfloat16, plain.FLOAT8)  # to NumPy
        return np.array((x if is_known else x.float()).cpu().numpy())  # never a view of the state

    def evaluate(self, *values: Any) -> None:
        """Nothing to do: torch starts each operation when it is called."""

    def memory_stats(self) -> dict[str, int]:
        if self._device.type == "cpu":
            return host_memory_stats()
        free, total = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return {"total": total, "free": free + cached, "peak": torch.cuda.max_memory_allocated(self._device)}

    def new_memory(
        self,
        rows: int,
        kv_heads: int,
        head_dim: int,
        index_dim: int | None,
        dtype: str,
        stored: MemoryDtypes = MODEL_DTYPE,
    ) -> Memory:
        k_idx = None if index_dim is None else self._rows(rows, index_dim, dtype=stored.index or dtype)
        k, v = (self._rows(rows, kv_heads, head_dim, dtype=stored.kv or dtype) for _ in range(2))
        return Memory(k, v, k_idx)

    def new_window(self, slots: int, window: int, kv_heads: int, head_dim: int, dtype: str) -> Window:
        k, v = (self._rows(slots * window, kv_heads, head_dim, dtype=dtype) for _ in range(2))
        return Window(k, v, window)

    def _rows(self, rows: int, *shape: int, dtype: str) -> Tensor:
        torch_dtype = plain.FLOAT8 if dtype == FP8 else plain.DTYPES[dtype]
        return state.empty_rows(rows, *shape, dtype=torch_dtype, device=self._device)

    float8_weight = staticmethod(plain.float8_weight)
    cast = staticmethod(plain.cast)
    itemsize = staticmethod(plain.itemsize)
    take = staticmethod(plain.take)
    concat = staticmethod(plain.concat)
    embed = staticmethod(plain.embed)
    linear = staticmethod(plain.linear)
    rms_norm = staticmethod(plain.rms_norm)
    linears = staticmethod(plain.linears)
    add_linear = staticmethod(plain.add_linear)
    norm_rope = staticmethod(plain.norm_rope)
    swiglu = staticmethod(plain.swiglu)
    write_memory = staticmethod(state.write_memory)
    write_window = staticmethod(state.write_window)
    copy_window = staticmethod(state.copy_window)
    select = staticmethod(select)
    take_selection = staticmethod(take_selection)
    gather_attention = staticmethod(gather_attention)
    dense_attention = staticmethod(dense_attention)
    sliding_attention = staticmethod(sliding_attention)
    sample = staticmethod(sample)


def _no_fp8(device: torch.device) -> dict[str, str]:
    """`Ops.no_fp8`: every CPU converts E4M3, a GPU from `FLOAT8_CAPABILITY` on."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else FLOAT8_CAPABILITY
    if capability >= FLOAT8_CAPABILITY:
        return {}
    needed, found = (".".join(map(str, version)) for version in (FLOAT8_CAPABILITY, capability))
    reason = f"fp8 needs compute capability {needed} (Ada) or later, and {device} has {found}; leave fp8 out"
    return {"memory": reason, "weights": reason}


def _host_tensor(x: np.ndarray) -> Tensor:
    """A tensor of its own: the caller may change or unmap `x`, and memory-mapped weights are read-only."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(x, order="C").view(np.int16)).view(torch.bfloat16)
    if x.dtype.kind == "u" and x.dtype.itemsize > 1:
        return torch.from_numpy(x.astype(np.int64))  # torch has no arithmetic on uint16 and uint32
    return torch.from_numpy(np.array(x, dtype=np.float32 if x.dtype == np.float64 else x.dtype, order="C"))
