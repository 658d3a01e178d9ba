"""Copies between host and device: a step's many small arrays in one, and beside the computation where they can be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; kernels may load vectors
_WIDENED = {np.dtype(np.uint32): np.dtype(np.int64)}  # torch has no arithmetic on uint32


@dataclass(frozen=True)
class Streams:
    """The streams of one GPU beside the one that computes. Copies run on them, kernels never: kernels share counters.

    Each copies in the order in which it was asked to, whoever asked.
    """

    inward: torch.cuda.Stream  # host to device
    outward: torch.cuda.Stream  # device to host
    capture: torch.cuda.Stream  # where graphs are recorded; torch's own such stream belongs to one GPU


_streams: dict[torch.device, Streams] = {}
_streams_lock = threading.Lock()


def streams(device: torch.device) -> Streams:
    """The same for every caller in the process; `device` has its number."""
    with _streams_lock:
        if device not in _streams:
            _streams[device] = Streams(*(torch.cuda.Stream(device) for _ in range(3)))
        return _streams[device]


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Page-locked host memory. torch keeps what is freed and gives it out again once the copies that used it are done,
    so this asks the driver only when a size is new."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


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

    def new_host(self) -> Tensor:
        """Page-locked memory for the arrays: [num_bytes] uint8, or one byte if there are none."""
        return pinned([max(1, self.num_bytes)], torch.uint8)

    def host_views(self, buffer: Tensor) -> list[np.ndarray]:
        """The arrays inside a buffer on the host, to be written."""
        host = buffer.numpy()
        return [host[offset : offset + size].view(dtype).reshape(shape) for offset, size, dtype, shape in self._slots]

    def pack(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """The arrays in new page-locked memory."""
        out = self.new_host()
        fill(self.host_views(out), arrays)
        return out

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The arrays inside a buffer on any device."""
        return [
            buffer[offset : offset + size].view(getattr(torch, dtype.name)).view(shape)
            for offset, size, dtype, shape in self._slots
        ]


def fill(views: Sequence[np.ndarray], arrays: Sequence[np.ndarray]) -> None:
    """Write arrays to where `Layout.host_views` says."""
    for view, x in zip(views, arrays, strict=True):
        view[...] = x


def start_fetch(arrays: Sequence[Tensor], device: torch.device) -> Callable[[], list[np.ndarray]]:
    """Copy to the host behind what is queued now, beside what comes later; the result waits for that and no longer.

    Whoever writes to one of the arrays again must let that wait for `streams(device).outward`; dropping them is safe.
    """
    outward = streams(device).outward
    computed, copied = torch.cuda.Event(), torch.cuda.Event()
    computed.record(torch.cuda.current_stream(device))
    outward.wait_event(computed)
    with torch.cuda.stream(outward):
        copies = [pinned(x.shape, x.dtype).copy_(x, non_blocking=True) for x in arrays]
        copied.record(outward)
    kept = list(arrays)  # as long as somebody may ask for their copies, torch must not give their memory away

    def wait() -> list[np.ndarray]:
        copied.synchronize()
        kept.clear()
        return [np.array((x.float() if x.dtype == torch.bfloat16 else x).numpy()) for x in copies]

    return wait
