"""Decode steps as CUDA graphs: from tokens to samples in one launch, with nothing for the host to do in between.

Of a step with prompts it is the part behind the prefill exit, whose rows are copied to where recordings look for them.

Between two graphs the device should find nothing else to do. So each shape of step has two recordings, which take
turns and have buffers of their own: while one runs, the inputs of the other are copied, and what that sampled is read.
All recordings compute in the same memory, one after the other. What is read while the next one runs lies elsewhere:
tokens in the place of their turn, where the next step, whose turn is the other one, looks for them.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from clsa.ops import Compute, RestInputs, Sampled, State, StepInputs, map_arrays
from clsa_cuda.transfer import Layout, fill, streams

_MAX_ROWS = 4096  # sequences of a step, as EngineConfig bounds them
_one_capture = threading.Lock()  # torch allows no second one in a process
_Kind = tuple[torch.Size, torch.dtype]
_Inputs = StepInputs | RestInputs


class _Recording:
    """A shape of step with addresses of its own. `graph` is None until the step was recorded here."""

    def __init__(self, inputs: _Inputs, arrays: list[np.ndarray], device: torch.device) -> None:
        """Args: tensors in `inputs` are where they will be in every step."""
        layout = Layout(arrays)
        self.staging = layout.new_host()
        self.host = layout.host_views(self.staging)  # the inputs in page-locked memory
        self.buffer = torch.zeros(len(self.staging), dtype=torch.uint8, device=device)  # and all of them on the device
        views = dict(zip(map(id, arrays), layout.views(self.buffer), strict=True))
        self.inputs = map_arrays(inputs, lambda x: views[id(x)])
        self.graph: torch.cuda.CUDAGraph | None = None
        self.sampled: Sampled | None = None  # written by each replay, outside of the memory that graphs share
        self.copied = torch.cuda.Event()  # the newest inputs are in `buffer`
        self.done = torch.cuda.Event()  # the newest step here no longer reads `buffer`
        self.done.record()  # `buffer` may be memory that queued kernels still use
        self.buffer.record_stream(streams(device).inward)  # and is nobody else's while a copy is under way


class _Turn:
    """Where the recordings of one of the two turns leave their tokens, and those of the other find them."""

    def __init__(self, device: torch.device) -> None:
        self.tokens = torch.zeros(_MAX_ROWS, dtype=torch.int32, device=device)
        self.fetched = torch.cuda.Event()  # what was sampled in this turn was read by those who asked for it


class Recorder:
    """Runs a decode step, or the rest of one, directly the first time its shape is seen, then records it twice.

    After that it is replayed. Kernels are compiled and tuned by the time a step is recorded. Steps come from one thread
    at a time.
    """

    def __init__(self, compute: Compute, device: torch.device) -> None:
        self._compute, self._device = compute, device
        self._graphs: dict[tuple[Any, int], _Recording] = {}  # by shape and turn
        self._compiled: dict[Any, list[_Kind | None]] = {}  # shapes of step that have run, and what they sampled
        self._turns = (_Turn(device), _Turn(device))
        self._places: dict[Any, Tensor] = {}  # of what is on the device when a step comes; recordings share them
        self._turn = 0
        self._pool: Any = None

    def __call__(self, inputs: _Inputs, previous: Tensor | None, state: State) -> tuple[Sampled | None, State]:
        torch.cuda.set_device(self._device)
        last, self._turn = self._turns[self._turn], 1 - self._turn
        last.fetched.record(streams(self._device).outward)  # behind all that was asked for until now
        inputs = self._placed(inputs)
        shape, arrays = _flattened(inputs)
        recording = self._graphs.get((shape, self._turn))
        if recording is None:
            recording = self._graphs[shape, self._turn] = _Recording(inputs, arrays, self._device)
        self._hold(previous, last)
        self._send(recording, arrays)
        try:
            if recording.graph is None:
                if shape not in self._compiled:
                    sampled, state = self._compute(recording.inputs, last.tokens, state)
                    self._compiled[shape] = [None if x is None else (x.shape, x.dtype) for x in _fields(sampled)]
                    return sampled, state
                self._record(recording, self._compiled[shape], state)
            self._replay(recording)
        finally:
            recording.done.record()
        return recording.sampled, state

    def _placed(self, inputs: _Inputs) -> _Inputs:
        """With what is on the device copied to the place of its number and shape, behind all that still reads there."""
        number = itertools.count()

        def placed(x: Tensor) -> Tensor:
            key = next(number), x.shape, x.dtype
            if key not in self._places:
                self._places[key] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            return self._places[key].copy_(x)

        return cast(_Inputs, map_arrays(inputs, placed, Tensor))

    def _hold(self, previous: Tensor | None, turn: _Turn) -> None:
        """Have the tokens that this step begins with where its recording looks for them."""
        if previous is not None and previous.data_ptr() != turn.tokens.data_ptr():
            torch.cuda.current_stream().wait_event(turn.fetched)
            turn.tokens[: len(previous)].copy_(previous)

    def _send(self, recording: _Recording, arrays: list[np.ndarray]) -> None:
        """Copy the inputs while the step before still runs. The host waits only if it is two steps ahead."""
        recording.copied.synchronize()  # before `staging` is written again
        fill(recording.host, arrays)
        inward = streams(self._device).inward
        inward.wait_event(recording.done)
        with torch.cuda.stream(inward):
            recording.buffer.copy_(recording.staging, non_blocking=True)
            recording.copied.record(inward)
        torch.cuda.current_stream().wait_event(recording.copied)

    def _record(self, recording: _Recording, kinds: list[_Kind | None], state: State) -> None:
        """Recording computes nothing; the state is written in place, so its addresses are good for every replay."""
        with _one_capture:
            try:
                return self._capture(recording, kinds, state)
            except torch.OutOfMemoryError:
                pass  # behind this line nothing refers any more to what the failed one made
            torch.cuda.empty_cache()  # while it captures, torch doesn't by itself
            self._capture(recording, kinds, state)

    def _capture(self, recording: _Recording, kinds: list[_Kind | None], state: State) -> None:
        """A graph of the step. Other threads may allocate and wait meanwhile, only this one may not.

        `torch.cuda.graph` is not used because it first waits for the device and empties torch's cache: milliseconds.
        """
        graph, results = torch.cuda.CUDAGraph(), self._results(kinds)
        with torch.cuda.stream(streams(self._device).capture):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                sampled, _ = self._compute(recording.inputs, self._turns[1 - self._turn].tokens, state)
                for x, result in zip(_fields(sampled), results, strict=True):
                    if x is not None:
                        torch.add(x, 0, out=result)  # a kernel: a copy would become two nodes
            finally:
                graph.capture_end()
        self._pool = self._pool or graph.pool()
        recording.graph, recording.sampled = graph, Sampled(*results) if results else None

    def _results(self, kinds: list[_Kind | None]) -> list[Tensor | None]:
        """Where a recording of this turn leaves what it samples: tokens in the turn's own place."""
        results = [None if kind is None else torch.empty(kind[0], dtype=kind[1], device=self._device) for kind in kinds]
        if results:
            assert kinds[0] is not None and kinds[0][1] == torch.int32
            results[0] = self._turns[self._turn].tokens[: kinds[0][0][0]]
        return results

    def _replay(self, recording: _Recording) -> None:
        assert recording.graph is not None
        torch.cuda.current_stream().wait_event(self._turns[self._turn].fetched)
        recording.graph.replay()


def _fields(sampled: Sampled | None) -> list[Tensor | None]:
    return [] if sampled is None else [sampled.tokens, sampled.logprobs, sampled.top_tokens, sampled.top_logprobs]


def _flattened(inputs: _Inputs) -> tuple[Any, list[np.ndarray]]:
    """All that a graph of these inputs depends on, as a key; and their arrays, each of them once."""
    parts: list[Any] = []
    arrays: list[np.ndarray] = []
    _flatten(inputs, parts, arrays, {})
    return tuple(parts), arrays


def _flatten(value: Any, parts: list[Any], arrays: list[np.ndarray], places: dict[int, int]) -> None:
    if isinstance(value, np.ndarray):
        place = places.setdefault(id(value), len(arrays))
        if place == len(arrays):
            arrays.append(value)
        parts.append((place, value.shape, value.dtype))
    elif isinstance(value, Tensor):
        parts.append(value.data_ptr())  # recordings are made for where it lies
    elif (names := getattr(type(value), "__dataclass_fields__", None)) is not None:
        parts.append(type(value))
        for name in names:
            _flatten(getattr(value, name), parts, arrays, places)
    else:
        parts.append(value)
