"""Where arrays begin: a step plan of integers in, a sample on the device out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from clsa.batch import SequenceChunk, build_batch
from clsa.config import PAGE_SIZE
from clsa.model import Params, forward, new_state
from clsa.ops import Array, Ops, Sampled, State
from clsa.plan import Plan
from clsa.sampling import SamplingRow, build_sampling
from clsa.scheduler import Chunk, StepPlan


class Runner:
    """Owns the state on the device and runs one step at a time; nothing here waits for the device."""

    def __init__(self, ops: Ops, params: Params, plan: Plan, dtype: str, num_pages: int, num_slots: int) -> None:
        self.ops = ops
        self._params = params
        self._plan = plan
        self._state = new_state(ops, plan, num_pages * PAGE_SIZE, num_slots, dtype)

    def launch(self, step: StepPlan, previous: Sampled | None) -> Sampled | None:
        """Start a step. `previous` is what the step before returned. None if no chunk wanted logits."""
        ops = self.ops
        self._copy_windows(step.restores)
        before = None if previous is None else previous.tokens
        chunks = [_sequence_chunk(chunk) for chunk in step.chunks]
        window = self._plan.config.sliding_window
        batch = build_batch(ops, chunks, window, _pending_tokens(ops, step.chunks, chunks, before))
        logits, self._state = forward(ops, self._params, self._plan, batch, self._state)
        sampled = None
        if logits is not None:
            rows = [_sampling_row(chunk) for chunk in step.chunks if chunk.wants_logits]
            sampled = ops.sample(logits, build_sampling(ops, rows, before))
        self._copy_windows(step.snapshots)
        ops.evaluate(sampled, self._state)
        return sampled

    def _copy_windows(self, copies: Sequence[tuple[int, int]]) -> None:
        if not copies or not self._state.windows:
            return
        source, target = (self.ops.asarray(np.array(slots, np.int32)) for slots in zip(*copies, strict=True))
        windows = tuple(self.ops.copy_window(window, source, target) for window in self._state.windows)
        self._state = State(self._state.memories, windows)


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
