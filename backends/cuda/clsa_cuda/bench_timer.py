"""For `clsa bench`: device time, from events around replays of a CUDA graph, so that launches cost nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clsa_cuda.ops import TorchOps

_SAMPLE_MS = 2.0  # of device work between two events
_MIN_SAMPLES, _MAX_SAMPLES = 5, 200


def device_timer(ops: TorchOps) -> Callable[..., tuple[str, list[float]]] | None:
    """A `clsa.bench.timing.DeviceTimer` for the GPU of these ops; None where they run on the CPU.

    What cannot be captured is timed as it is launched from Python, and the name of the clock says so and why.
    """

    device = ops.asarray(np.zeros(1, np.int32)).device
    if device.type == "cpu":
        return None

    def timer(run: Callable[[int], Any], num_inputs: int, seconds: float) -> tuple[str, list[float]]:
        with torch.cuda.device(device):
            replay, clock = _captured(run, num_inputs)
            replay()
            torch.cuda.synchronize()
            repeats = max(1, round(_SAMPLE_MS / max(statistics.median(_milliseconds(replay, 1, 3)), 1e-3)))
            samples: list[float] = []
            begin = time.perf_counter()
            while len(samples) < _MIN_SAMPLES or (
                time.perf_counter() - begin < seconds and len(samples) < _MAX_SAMPLES
            ):
                samples += _milliseconds(replay, repeats, 5)
            return clock, [sample / num_inputs / 1e3 for sample in samples]

    return timer


def _captured(run: Callable[[int], Any], num_inputs: int) -> tuple[Callable[[], None], str]:
    """All calls once, as one graph if that is possible, and the name of what they are timed with."""

    def launch() -> None:
        for i in range(num_inputs):
            run(i)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            launch()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return launch, f"CUDA events, launched from Python (no graph: {' '.join(str(error).split())[:80]})"
    return graph.replay, "CUDA events around graph replays"


def _milliseconds(replay: Callable[[], None], repeats: int, samples: int) -> list[float]:
    """Milliseconds of one replay, as the mean of `repeats`, so many times."""
    pairs = []
    for _ in range(samples):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            replay()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / repeats for start, stop in pairs]
