"""A step's many small arrays in one copy, and samples back to the host without waiting for what came later."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; kernels may load vectors
_WIDENED = {np.dtype(np.uint32): np.dtype(np.int64)}  # torch has no arithmetic on uint32


class Layout:
    """Where arrays of given shapes and dtypes lie in one buffer of bytes."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._slots: list[tuple[int, int, np.dtype, tuple[int, ...]]] = []
        self.num_bytes = 0
        for x in arrays:
            dtype = _WIDENED.get(x.dtype, x.dtype)
            size = x.size * dtype.itemsize
            self._slots.append((self.num_bytes, size, dtype, x.shape))
            self.num_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def pack(self, arrays: Sequence[np.ndarray], out: Tensor | None = None) -> Tensor:
        """The arrays in page-locked host memory [num_bytes] uint8: `out` if given, else a new one."""
        if out is None:
            out = torch.empty(max(1, self.num_bytes), dtype=torch.uint8, pin_memory=True)
        buffer = out.numpy()
        for x, (offset, size, dtype, shape) in zip(arrays, self._slots, strict=True):
            buffer[offset : offset + size].view(dtype).reshape(shape)[...] = x
        return out

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The arrays inside a buffer on any device."""
        return [
            buffer[offset : offset + size].view(getattr(torch, dtype.name)).view(shape)
            for offset, size, dtype, shape in self._slots
        ]


def start_fetch(arrays: Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
    """Copy to the host behind what is queued now; the result waits for that and no longer."""
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in arrays]
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[np.ndarray]:
        done.synchronize()
        return [np.array((x.float() if x.dtype == torch.bfloat16 else x).numpy()) for x in copies]

    return wait
