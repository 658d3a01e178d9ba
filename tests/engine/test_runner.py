"""The runner: step plans in, samples out; the newest tokens may still be on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clsa.batch import upload
from clsa.config import ModelConfig, SamplingParams
from clsa.ops import Compute, Ops, RestInputs, Sampled, State, StepInputs
from clsa.params import nest
from clsa.plan import make_plan
from clsa.request import Request
from clsa.runner import Launched, Runner, StepFailed
from clsa.step_plan import Chunk, StepPlan
from tests.engine import models
from tests.engine.models import CONFIG, CROSS, FULL, SLIDING, Failing, on_backends, open_ops

PARAMS = SamplingParams(max_tokens=50, repetition_penalty=1.4, logprobs=2)
# Prefill exits behind the write of a memory, of the last of four (with a selection made before it), behind a window.
PLANS = {
    "clsa": CONFIG,
    "yoco": replace(CONFIG, index_topk_pattern="DD"),
    "full": replace(CONFIG, layer_types=(FULL,) * 4, index_topk_pattern="FSFS"),
    "window": replace(CONFIG, layer_types=(SLIDING, CROSS, CROSS, SLIDING)),
}
PROMPTS = [[5, 9, 200, 31], [77], list(range(100, 190))]


class Device:
    """A runner whose requests own two pages and one window slot each."""

    def __init__(self, ops: Ops, config: ModelConfig = CONFIG) -> None:
        self.ops = ops
        weights = nest({name: ops.asarray(w, "float32") for name, w in models.params(config).items()})
        self.runner = Runner(ops, weights, make_plan(config), "float32", num_pages=8, num_slots=6, max_pages=2)
        self.requests = [Request(str(i), list(prompt), PARAMS) for i, prompt in enumerate(PROMPTS)]
        for i, request in enumerate(self.requests):
            request.pages, request.window_slot = [2 * i + 1, 2 * i], i

    def prefill(self) -> StepPlan:
        return plan(*(Chunk(r, 0, r.num_prompt_tokens, True, None) for r in self.requests))

    def decode(self, step: int, rows: tuple[int | None, ...]) -> StepPlan:
        """All requests, in another order each time."""
        places = [request.num_prompt_tokens + step for request in self.requests]
        return plan(*(Chunk(self.requests[i], places[i], places[i] + 1, True, rows[i]) for i in (1, 2, 0)))

    def append(self, rows: tuple[int, ...], sampled: Sampled) -> None:
        for i, token in zip(rows, sampled.tokens.tolist()):
            self.requests[i].tokens.append(token)

    def read(self, launched: Launched | None) -> Sampled:
        assert launched is not None
        return self.runner.read(launched)


class Padding:
    """Ops that record decode steps, and others behind the prefill exit where `rest`.

    They run what a recorder would record: the padded step, poison behind it.
    """

    def __init__(self, ops: Ops, rest: bool = False) -> None:
        self._ops, self.records_rest = ops, rest
        self.shapes: list[tuple[int, ...]] = []
        self.rests: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def record(self, compute: Compute) -> Compute:
        def recorded(inputs: StepInputs | RestInputs, previous: Any, state: State) -> tuple[Sampled | None, State]:
            if isinstance(inputs, RestInputs):
                self.rests.append((len(inputs.rows.x), *inputs.rows.queries.block_table.shape))
            else:
                self.shapes.append(inputs.batch.queries.block_table.shape)
            if previous is None:
                previous = self._ops.asarray(np.full(8, 1 << 20, np.int32))
            return compute(upload(self._ops, inputs), previous, state)

        return recorded


def assert_close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def plan(*chunks: Chunk, restores: Any = (), snapshots: Any = ()) -> StepPlan:
    return StepPlan(chunks, restores, snapshots, sum(chunk.stop - chunk.start for chunk in chunks))


@pytest.mark.parametrize("padded", ["", "decodes", "rests"])
@on_backends
def test_tokens_that_are_still_on_the_device(backend: str, padded: str) -> None:
    """Steps launched before the one before is read give what they give one by one, penalties included.

    Also in the shapes that a backend gets which records its steps.
    """
    padding = Padding(open_ops(backend), padded == "rests")
    ahead = Device(padding if padded else open_ops(backend))
    one_by_one = Device(open_ops(backend))
    order = [(0, 1, 2), (1, 2, 0), (1, 2, 0), (1, 2, 0)]  # requests by row
    pending = [(None, None, None), (0, 1, 2), (2, 0, 1), (2, 0, 1)]  # rows by request
    results: list[Sampled] = []
    before: Launched | None = None
    for step in range(4):
        launched = ahead.runner.launch(ahead.decode(step - 1, pending[step]) if step else ahead.prefill(), before)
        if before is not None:
            results.append(ahead.read(before))
            ahead.append(order[step - 1], results[-1])
        before = launched
    results.append(ahead.read(before))

    for step, rows in enumerate(order):
        plan = one_by_one.decode(step - 1, (None, None, None)) if step else one_by_one.prefill()
        result = one_by_one.read(one_by_one.runner.launch(plan, None))
        assert result.tokens.tolist() == results[step].tokens.tolist()
        assert_close(result.logprobs, results[step].logprobs)
        assert result.top_tokens is not None and result.top_tokens.shape == (3, 2)
        one_by_one.append(rows, result)
    assert padding.shapes == ([(4, 2)] * 3 if padded else [])
    assert padding.rests == ([(4, 4, 2)] if padded == "rests" else [])


@pytest.mark.parametrize("name", PLANS)
@on_backends
def test_a_step_in_two_parts(backend: str, name: str) -> None:
    """Decodes, a chunk in the middle of a prompt and one at its end, in any order: as in one part."""
    padding, results = Padding(open_ops(backend), True), []
    for ops in (open_ops(backend), padding):
        device = Device(ops, PLANS[name])
        first, second, third = device.requests
        begun = device.runner.launch(plan(Chunk(second, 0, 1, True, None)), None)
        chunks = [Chunk(third, 0, 30, False, None), Chunk(second, 1, 2, True, 0), Chunk(first, 0, 4, True, None)]
        results.append(device.read(device.runner.launch(plan(*chunks), begun)))
        third_again = Chunk(third, 30, 90, True, None)
        results.append(device.read(device.runner.launch(plan(third_again), None)))
    assert padding.rests == [(2, 2, 1), (1, 1, 2)]
    for alone, parts in zip(results[:2], results[2:], strict=True):
        assert alone.tokens.tolist() == parts.tokens.tolist()
        assert_close(alone.logprobs, parts.logprobs)


@on_backends
def test_some_tokens_on_the_device_and_some_not(backend: str) -> None:
    device = Device(open_ops(backend))
    first = device.runner.launch(device.prefill(), None)
    tokens = device.read(first).tokens.tolist()
    known, mixed = Device(open_ops(backend)), Device(open_ops(backend))
    for other in (known, mixed):
        other.runner.launch(other.prefill(), None)
    for request, token in zip(known.requests, tokens):
        request.tokens.append(token)
    mixed.requests[1].tokens.append(tokens[1])
    wanted = known.read(known.runner.launch(known.decode(0, (None, None, None)), None))
    got = mixed.read(mixed.runner.launch(mixed.decode(0, (0, None, 2)), first))
    assert got.tokens.tolist() == wanted.tokens.tolist()


@on_backends
def test_a_snapshot_is_the_window_as_it_was(backend: str) -> None:
    """Request 0 goes on from a copy of its window after another one has used its slot."""
    device = Device(open_ops(backend))
    request, other = device.requests[2], device.requests[0]
    begin = plan(Chunk(request, 0, 64, False, None), snapshots=((2, 5),))
    rest = plan(Chunk(request, 64, 90, True, None))
    assert device.runner.launch(begin, None) is None, "nobody wants logits in the middle of a prompt"
    wanted = device.read(device.runner.launch(rest, None))
    other.window_slot = 2
    device.runner.launch(plan(Chunk(other, 0, 4, True, None)), None)
    request.window_slot = 3
    again = plan(Chunk(request, 64, 90, True, None), restores=((5, 3),))
    got = device.read(device.runner.launch(again, None))
    assert_close(got.top_logprobs, wanted.top_logprobs)
    without = device.read(device.runner.launch(replace(again, restores=((4, 3),)), None))
    assert np.abs(np.asarray(without.top_logprobs) - np.asarray(wanted.top_logprobs)).max() > 1e-2


@on_backends
def test_failures_are_one_sentence_and_reset_begins_anew(backend: str) -> None:
    ops: Any = Failing(open_ops(backend))
    device = Device(ops)
    wanted = device.read(device.runner.launch(device.prefill(), None))
    ops.fail("norm_linears", 2, ValueError("bad\n  shape"))
    with pytest.raises(StepFailed, match=r"^the step failed: ValueError: bad shape$"):
        device.runner.launch(device.prefill(), None)
    device.runner.reset()
    sampled = device.runner.launch(device.prefill(), None)
    assert sampled is not None
    with pytest.raises(StepFailed, match=r"^the step failed: MemoryError:$"):
        device.read(replace(sampled, wait=_out_of_memory))
    device.runner.reset()
    got = device.read(device.runner.launch(device.prefill(), None))
    assert got.tokens.tolist() == wanted.tokens.tolist()
    ops.fail("embed", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        device.runner.launch(device.prefill(), None)


def _out_of_memory() -> Any:
    raise MemoryError
