"""Where arrays begin: a step plan of integers in, a sample on the device out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from clsa.batch import upload
from clsa.config import MODEL_DTYPE, PAGE_SIZE, MemoryDtypes
from clsa.model import Params, enter, leave, new_state
from clsa.ops import Array, Ops, RestInputs, Rows, Sampled, State, StepInputs
from clsa.plan import Plan
from clsa.prefix_state import read_rows, write_rows
from clsa.sampling import resolve
from clsa.step import PageTables, pad_decode, pad_rest, step_inputs
from clsa.step_plan import StepPlan

_log = logging.getLogger(__name__)


class StepFailed(Exception):
    """The array library gave up in the middle of a step; nothing that was on the device may be trusted."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way: its samples on the device, and how to wait for them. Padded rows come last."""

    tokens: Array  # [n] int32
    wait: Callable[[], list[np.ndarray]]
    num_rows: int


class Computation:
    """What a step computes on the device: a recorder refers to this and not to the runner, which refers to it.

    With the runner in its place, weights and state would stay until Python happens to look for cycles, as it rarely
    does for a few objects, however many bytes they hold.
    """

    def __init__(self, ops: Ops, params: Params, plan: Plan) -> None:
        self.ops, self._params, self._plan = ops, params, plan

    def __call__(
        self, inputs: StepInputs | RestInputs, previous: Array | None, state: State
    ) -> tuple[Sampled | None, State]:
        """One step, or what is left of it: to the samples."""
        ops = self.ops
        if isinstance(inputs, RestInputs):
            rows: Rows | None = inputs.rows
        else:
            rows, state = self.enter(inputs, previous, state)
        sampling = inputs.sampling
        if rows is None or sampling is None:
            return None, state
        logits = leave(ops, self._params, self._plan, rows, state)
        if sampling.penalty_tokens is not None:
            seen = resolve(ops, sampling.penalty_tokens, inputs.penalty_source, previous)
            sampling = replace(sampling, penalty_tokens=seen)
        return ops.sample(logits, sampling), state

    def enter(self, inputs: StepInputs, previous: Array | None, state: State) -> tuple[Rows | None, State]:
        """From tokens to the prefill exit."""
        batch = inputs.batch
        batch = replace(batch, tokens=resolve(self.ops, batch.tokens, inputs.token_source, previous))
        return enter(self.ops, self._params, self._plan, batch, state)


class Runner:
    """Owns the state on the device and runs one step at a time; only `read` waits for the device.

    Both methods raise StepFailed, in one sentence, for whatever goes wrong in the array library. `reset` must follow.
    """

    def __init__(
        self,
        ops: Ops,
        params: Params,
        plan: Plan,
        dtype: str,
        num_pages: int,
        num_slots: int,
        max_pages: int,
        stored: MemoryDtypes = MODEL_DTYPE,
    ) -> None:
        """`max_pages` is the longest page table that a sequence can have."""
        self._ops, self._plan, self._compute = ops, plan, Computation(ops, params, plan)
        self._dtype, self._num_rows, self._num_slots = dtype, num_pages * PAGE_SIZE, num_slots
        self._max_pages, self._stored = max_pages, stored
        self._state: State | None = self._new_state()
        self._recorded = ops.record(self._compute)
        self._tables = PageTables()

    def launch(self, step: StepPlan, previous: Launched | None) -> Launched | None:
        """Start a step. `previous` is what the step before returned. None if no chunk wanted logits."""
        with _device_work():
            return self._launch(step, previous)

    def read(self, launched: Launched) -> Sampled:
        """The samples of a step on the host, in NumPy arrays. Waits for that step and for none after it."""
        with _device_work():
            arrays = [x[: launched.num_rows] for x in launched.wait()]
        return Sampled(*arrays, *[None] * (4 - len(arrays)))

    def read_prefix(self, pages: Sequence[int], slot: int) -> dict[str, np.ndarray]:
        """See `read_rows`; what steps under way write is waited for."""
        with _device_work():
            return read_rows(self._ops, self._new_state() if self._state is None else self._state, pages, slot)

    def write_prefix(self, pages: Sequence[int], slot: int, arrays: dict[str, np.ndarray]) -> None:
        """See `write_rows`."""
        with _device_work():
            state = self._new_state() if self._state is None else self._state
            self._state = write_rows(self._ops, state, self._dtype, pages, slot, arrays)
            self._ops.evaluate(self._state)

    def reset(self) -> None:
        """Forget all state; the next step begins with an empty one."""
        self._state = None  # before anything new is allocated: there may be no room for both
        self._recorded = self._ops.record(self._compute)

    def _launch(self, step: StepPlan, previous: Launched | None) -> Launched | None:
        ops = self._ops
        state = self._new_state() if self._state is None else self._state
        self._state = state = self._copy_windows(state, step.restores)
        inputs = step_inputs(step, self._plan.config.sliding_window, self._tables)
        before = None if previous is None else previous.tokens
        sampled, state = self._run(inputs, before, state)
        # The old state goes before the new one is computed, so that a lazy backend writes in place.
        self._state = state = self._copy_windows(state, step.snapshots)
        ops.evaluate(sampled, state)
        if sampled is None:
            return None
        arrays = [sampled.tokens, sampled.logprobs, sampled.top_tokens, sampled.top_logprobs]
        num_rows = sum(chunk.wants_logits for chunk in step.chunks)
        return Launched(sampled.tokens, ops.fetch([x for x in arrays if x is not None]), num_rows)

    def _run(self, inputs: StepInputs, previous: Array | None, state: State) -> tuple[Sampled | None, State]:
        """One step from arrays of the host, as much of it recorded as can be."""
        ops, recorded = self._ops, self._recorded
        if recorded is not None and _is_decode(inputs):
            return recorded(pad_decode(inputs, self._max_pages), previous, state)
        padded = pad_rest(inputs, self._max_pages) if recorded is not None and ops.records_rest else None
        if recorded is None or padded is None or padded.sampling is None:
            return self._compute(upload(ops, inputs), previous, state)
        # The queries of the rest stay on the host, where what is recorded wants them.
        first = upload(ops, StepInputs(replace(padded.batch, logits_queries=None), None, padded.token_source, None))
        batch = replace(first.batch, logits_queries=padded.batch.logits_queries)
        rows, state = self._compute.enter(replace(first, batch=batch), previous, state)
        assert rows is not None
        return recorded(RestInputs(rows, padded.sampling, padded.penalty_source), previous, state)

    def _new_state(self) -> State:
        return new_state(self._ops, self._plan, self._num_rows, self._num_slots, self._dtype, self._stored)

    def _copy_windows(self, state: State, copies: Sequence[tuple[int, int]]) -> State:
        if not copies or not state.windows:
            return state
        source, target = (self._ops.asarray(np.array(slots, np.int32)) for slots in zip(*copies, strict=True))
        windows = tuple(self._ops.copy_window(window, source, target) for window in state.windows)
        return State(state.memories, windows)


def _is_decode(inputs: StepInputs) -> bool:
    return inputs.batch.queries.one_each and inputs.batch.logits_rows is None and inputs.sampling is not None


@contextmanager
def _device_work() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _log.debug("a step failed", exc_info=True)
        raise StepFailed(f"the step failed: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
