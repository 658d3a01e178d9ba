"""Decode steps as CUDA graphs: from tokens to samples in one launch, with nothing for the host to do in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clsa.ops import Compute, Sampled, State, StepInputs, map_arrays
from clsa_cuda.transfer import Layout

_STAGING = 3  # host buffers in turn: one is filled while the copies of the two steps before may still be read
_MAX_ROWS = 4096  # sequences of a step, as EngineConfig bounds them


@dataclass(frozen=True)
class _Slot:
    """Where an array of the inputs stands; the inputs with slots for arrays are what a graph depends on."""

    index: int
    shape: tuple[int, ...]
    dtype: str


@dataclass
class _Graph:
    """One shape of step. `graph` is None until it has run once: kernels are compiled and tuned by then."""

    layout: Layout
    buffer: Tensor  # the inputs, always at this address
    inputs: StepInputs
    graph: torch.cuda.CUDAGraph | None = None
    sampled: Sampled | None = None


class Recorder:
    """Runs a decode step directly the first time its shape is seen, records it the second, then replays it."""

    def __init__(self, compute: Compute, device: torch.device) -> None:
        self._compute, self._device = compute, device
        self._graphs: dict[Any, _Graph] = {}
        self._previous = torch.zeros(_MAX_ROWS, dtype=torch.int32, device=device)
        self._pool: Any = None
        self._staging: dict[int, list[Tensor]] = {}
        self._turn = 0

    def __call__(self, inputs: StepInputs, previous: Tensor | None, state: State) -> tuple[Sampled | None, State]:
        torch.cuda.set_device(self._device)
        arrays: list[np.ndarray] = []
        places: dict[int, int] = {}

        def slot(x: np.ndarray) -> _Slot:
            if id(x) not in places:
                places[id(x)] = len(arrays)
                arrays.append(x)
            return _Slot(places[id(x)], x.shape, x.dtype.name)

        key = map_arrays(inputs, slot)
        if previous is not None:
            self._previous[: len(previous)].copy_(previous)
        is_new = key not in self._graphs
        if is_new:
            self._graphs[key] = self._prepare(inputs, arrays, places)
        graph = self._graphs[key]
        graph.buffer.copy_(self._pack(graph.layout, arrays), non_blocking=True)
        if is_new:
            return self._compute(graph.inputs, self._previous, state)
        if graph.graph is None:
            self._record(graph, state)
        assert graph.graph is not None
        graph.graph.replay()
        return graph.sampled, state

    def _prepare(self, inputs: StepInputs, arrays: list[np.ndarray], places: dict[int, int]) -> _Graph:
        layout = Layout(arrays)
        buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=self._device)
        views = layout.views(buffer)
        return _Graph(layout, buffer, map_arrays(inputs, lambda x: views[places[id(x)]]))

    def _record(self, graph: _Graph, state: State) -> None:
        """Recording computes nothing; the state is written in place, so its addresses are good for every replay."""
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, pool=self._pool):
            graph.sampled, _ = self._compute(graph.inputs, self._previous, state)
        self._pool = self._pool or recorded.pool()
        graph.graph = recorded

    def _pack(self, layout: Layout, arrays: list[np.ndarray]) -> Tensor:
        size = layout.num_bytes
        if size not in self._staging:
            self._staging[size] = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(_STAGING)]
        self._turn = (self._turn + 1) % _STAGING
        return layout.pack(arrays, self._staging[size][self._turn])
