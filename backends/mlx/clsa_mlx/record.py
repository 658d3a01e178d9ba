"""A decode step compiled by MLX, once per shape: the host then replays a graph instead of running the model's Python.

State goes in as arguments and comes out as results. Neither this nor MLX keeps an array of it, so writes stay in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from clsa.ops import Compute, Sampled, State, StepInputs, map_arrays
from clsa_mlx.trees import arrays_in, filled

Step = Callable[[list[mx.array], list[mx.array], list[mx.array]], tuple[list[mx.array], list[mx.array]]]


class Recorder:
    """`compute` for a StepInputs of host arrays; see `Ops.record`.

    MLX keeps what it compiles per thread, so a step that comes from another thread is compiled again.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._steps: dict[Any, Step] = {}  # by everything about a step that is no number of an array

    def __call__(self, inputs: StepInputs, previous: mx.array | None, state: State) -> tuple[Sampled | None, State]:
        given: list[np.ndarray] = []
        map_arrays(inputs, given.append)
        before = [] if previous is None else [_padded(previous)]
        key = map_arrays(inputs, lambda x: (x.shape, x.dtype.str)), len(before)
        if key not in self._steps:
            self._steps[key] = self._compiled(inputs, state)
        sampled, arrays = self._steps[key]([mx.array(x) for x in given], before, list(arrays_in(state)))
        left = iter(arrays)
        return Sampled(*sampled, *[None] * (4 - len(sampled))), filled(state, lambda _: next(left))

    def _compiled(self, inputs: StepInputs, state: State) -> Step:
        empty = filled(state, lambda _: mx.zeros(0))  # the closure must not hold the state itself,
        compute = self._compute  # nor the recorder, which holds the closure

        def step(given: list[mx.array], before: list[mx.array], held: list[mx.array]) -> Any:
            numbers, left = iter(given), iter(held)
            own = filled(empty, lambda _: next(left))
            batch = map_arrays(inputs, lambda _: next(numbers))
            sampled, new = compute(batch, before[0] if before else None, own)
            return list(arrays_in(sampled)), list(arrays_in(new))

        return mx.compile(step)


def _padded(previous: mx.array) -> mx.array:
    """With rows behind it that nobody asks for, so that few sizes occur."""
    rows = previous.shape[0]
    missing = (1 << (rows - 1).bit_length()) - rows
    return mx.pad(previous, (0, missing)) if missing else previous
