"""Times: which clock, how often, and the ceilings of the machine that they are compared with."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clsa.bench.random_arrays import RandomRows, wait
from clsa.ops import Array, Ops

Call = Callable[[int], Any]  # run(i): start the work on the i-th set of inputs, return what it computes

HOST_CLOCK = "host clock, many calls per synchronisation"
_SAMPLE_SECONDS = 0.02  # of calls between two synchronisations
_MIN_SAMPLES, _MAX_SAMPLES = 3, 200
_MATRIX_BYTES = (64 << 20, 512 << 20)  # at least and at most; between them a share of the free memory
_MATRIX_SHARE = 1 / 256
_MATRIX_WIDTH = 4096
_LONG_SECONDS = 0.02  # for one matrix product


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds per call of several samples, and the clock they were taken with."""

    samples: tuple[float, ...]
    clock: str

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        low, high = np.quantile(self.samples, (0.25, 0.75))
        return float((high - low) / 2 / self.median) if self.median > 0 else 0.0


class DeviceTimer(Protocol):
    """What a backend may offer: see `clsa.bench`."""

    def __call__(self, run: Call, num_inputs: int, seconds: float) -> tuple[str, list[float]]:
        """Time `run(0)`, `run(1)`, ... `run(num_inputs - 1)` in turn for about `seconds`.

        Returns the name of the clock, and seconds per call, one entry per sample.
        """
        ...


class Stopwatch:
    """Times work on one device with its own timer if there is one, or the host's clock."""

    def __init__(self, ops: Ops, timer: DeviceTimer | None, seconds: float) -> None:
        """Args: `seconds` to spend on each figure, warm-up not included."""
        self._ops, self._timer, self.seconds = ops, timer, seconds

    def time(self, run: Call, num_inputs: int = 1) -> Times:
        """Warm up on every set of inputs, then take samples. Inputs are used in turn."""
        for i in range(num_inputs):
            wait(self._ops, run(i))
        if self._timer is not None:
            clock, samples = self._timer(run, num_inputs, self.seconds)
            return Times(tuple(samples), clock)
        start = time.perf_counter()
        wait(self._ops, run(0))
        calls = max(1, round(_SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-7)))
        next_input, samples = 0, []
        begin = time.perf_counter()
        while _goes_on(len(samples), time.perf_counter() - begin, self.seconds):
            start = time.perf_counter()
            out = None
            for _ in range(calls):
                out = run(next_input % num_inputs)
                self._ops.evaluate(out)
                next_input += 1
            wait(self._ops, out)
            samples.append((time.perf_counter() - start) / calls)
        return Times(tuple(samples), HOST_CLOCK)


def time_blocking(run: Callable[[], object], seconds: float, warm_up: int = 1) -> Times:
    """Time calls that return when their work is done, one sample each."""
    for _ in range(warm_up):
        run()
    samples: list[float] = []
    begin = time.perf_counter()
    while _goes_on(len(samples), time.perf_counter() - begin, seconds):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return Times(tuple(samples), "host clock, each call waited for")


def _goes_on(samples: int, elapsed: float, seconds: float) -> bool:
    return samples < _MIN_SAMPLES or (elapsed < seconds and samples < _MAX_SAMPLES)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine does at best, through the ops: the fastest of several ways to ask for it."""

    read: float  # bytes per second
    read_by: str  # which way it was
    matmul: float  # floating-point operations per second


def measure_ceilings(ops: Ops, stopwatch: Stopwatch, dtype: str) -> Ceilings:
    """Read bandwidth over more memory than a cache holds, and the rate of a large matrix product.

    Ways to read: a product with 1 and with 8 rows, which reads a matrix and returns next to nothing; a sum of a matrix
    with itself, which writes as many bytes as it reads once. All inputs are random.
    """
    free, (low, high) = ops.memory_stats()["free"], _MATRIX_BYTES
    size = min(high, max(low, int(_MATRIX_SHARE * free)))
    rows, count = size // (_MATRIX_WIDTH * ops.itemsize(dtype)), 4
    source = RandomRows(ops, _MATRIX_WIDTH, dtype, seed=7)
    matrices: Sequence[Array] = [source.matrix(rows) for _ in range(count)]
    some = {n: source.take(n) for n in (1, 8)}
    num_bytes = rows * _MATRIX_WIDTH * ops.itemsize(dtype)
    ways: dict[str, tuple[Call, int]] = {
        "linear, 1 row": (lambda i: ops.linear(some[1], matrices[i]), num_bytes),
        "linear, 8 rows": (lambda i: ops.linear(some[8], matrices[i]), num_bytes),
        "x + x": (lambda i: matrices[i] + matrices[i], 2 * num_bytes),
    }
    rates = {name: moved / stopwatch.time(run, count).median for name, (run, moved) in ways.items()}
    best = max(rates, key=lambda name: rates[name])
    return Ceilings(rates[best], best, _matmul_rate(ops, stopwatch, dtype))


def _matmul_rate(ops: Ops, stopwatch: Stopwatch, dtype: str) -> float:
    """The best rate of square products of growing size, up to the first that takes long."""
    best = 0.0
    for size in (128, 256, 512, 1024, 2048, 4096, 8192):
        source = RandomRows(ops, size, dtype, seed=8)
        x, weight = source.matrix(size), source.matrix(size)
        seconds = stopwatch.time(functools.partial(_product, ops, x, weight)).median
        best = max(best, 2 * size**3 / seconds)
        if seconds > _LONG_SECONDS:
            break
    return best


def _product(ops: Ops, x: Array, weight: Array, _: int) -> Array:
    return ops.linear(x, weight)
