"""Where arrays begin: a step plan of integers in, a sample on the device out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from clsa.batch import SequenceChunk, build_batch
from clsa.config import PAGE_SIZE
from clsa.model import Params, forward, new_state
from clsa.ops import Array, Ops, Sampled, State
from clsa.plan import Plan
from clsa.sampling import SamplingRow, build_sampling
from clsa.scheduler import Chunk, StepPlan

_log = logging.getLogger(__name__)


class StepFailed(Exception):
    """The array library gave up in the middle of a step; nothing that was on the device may be trusted."""


class Runner:
    """Owns the state on the device and runs one step at a time; only `read` waits for the device.

    Both methods raise StepFailed, in one sentence, for whatever goes wrong in the array library. `reset` must follow.
    """

    def __init__(self, ops: Ops, params: Params, plan: Plan, dtype: str, num_pages: int, num_slots: int) -> None:
        self._ops, self._params, self._plan = ops, params, plan
        self._dtype, self._num_rows, self._num_slots = dtype, num_pages * PAGE_SIZE, num_slots
        self._state: State | None = self._new_state()

    def launch(self, step: StepPlan, previous: Sampled | None) -> Sampled | None:
        """Start a step. `previous` is what the step before returned. None if no chunk wanted logits."""
        with _device_work():
            return self._launch(step, previous)

    def read(self, sampled: Sampled) -> Sampled:
        """The same on the host, in NumPy arrays."""
        optional = (sampled.logprobs, sampled.top_tokens, sampled.top_logprobs)
        with _device_work():
            to_numpy = self._ops.to_numpy
            return Sampled(to_numpy(sampled.tokens), *(None if x is None else to_numpy(x) for x in optional))

    def reset(self) -> None:
        """Forget all state; the next step begins with an empty one."""
        self._state = None  # before anything new is allocated: there may be no room for both

    def _launch(self, step: StepPlan, previous: Sampled | None) -> Sampled | None:
        ops = self._ops
        state = self._new_state() if self._state is None else self._state
        self._state = state = self._copy_windows(state, step.restores)
        before = None if previous is None else previous.tokens
        chunks = [_sequence_chunk(chunk) for chunk in step.chunks]
        window = self._plan.config.sliding_window
        batch = build_batch(ops, chunks, window, _pending_tokens(ops, step.chunks, chunks, before))
        logits, state = forward(ops, self._params, self._plan, batch, state)
        sampled = None
        if logits is not None:
            rows = [_sampling_row(chunk) for chunk in step.chunks if chunk.wants_logits]
            sampled = ops.sample(logits, build_sampling(ops, rows, before))
        # The old state goes before the new one is computed, so that a lazy backend writes in place.
        self._state = state = self._copy_windows(state, step.snapshots)
        ops.evaluate(sampled, state)
        return sampled

    def _new_state(self) -> State:
        return new_state(self._ops, self._plan, self._num_rows, self._num_slots, self._dtype)

    def _copy_windows(self, state: State, copies: Sequence[tuple[int, int]]) -> State:
        if not copies or not state.windows:
            return state
        source, target = (self._ops.asarray(np.array(slots, np.int32)) for slots in zip(*copies, strict=True))
        windows = tuple(self._ops.copy_window(window, source, target) for window in state.windows)
        return State(state.memories, windows)


@contextmanager
def _device_work() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _log.debug("a step failed", exc_info=True)
        raise StepFailed(f"the step failed: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error


def _sequence_chunk(chunk: Chunk) -> SequenceChunk:
    request = chunk.request
    tokens = [0] if chunk.pending is not None else request.tokens[chunk.start : chunk.stop]
    return SequenceChunk(
        tokens, chunk.start, request.pages, request.window_slot, "last" if chunk.wants_logits else "none"
    )


def _sampling_row(chunk: Chunk) -> SamplingRow:
    return SamplingRow(chunk.request.params, chunk.stop, chunk.request.tokens, chunk.pending)


def _pending_tokens(
    ops: Ops, chunks: Iterable[Chunk], specs: Sequence[SequenceChunk], previous: Array | None
) -> Array | None:
    """The step's tokens where some of them are still on the device: [T] int32, or None if all are known."""
    pending = [chunk.pending for chunk in chunks]
    if previous is None or all(row is None for row in pending):
        return None
    known = np.concatenate([np.asarray(spec.tokens, np.int32) for spec in specs])
    source = np.arange(len(known), dtype=np.int32)
    first = 0
    for spec, row in zip(specs, pending, strict=True):
        if row is not None:
            source[first] = len(known) + row
        first += len(spec.tokens)
    return ops.take(ops.concat([ops.asarray(known), previous]), ops.asarray(source))
