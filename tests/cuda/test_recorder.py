"""Recorded steps: what they give, in whatever order the device gets to copies and graphs, and what failures leave."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from clsa_cuda.recorder import Recorder, _flattened
from clsa_cuda.transfer import Layout
from tests.cuda.fake_cuda import CPU, FakeCuda
from tests.cuda.toy_steps import EMPTY, Run, step_inputs, toy


def fake_run(patch: pytest.MonkeyPatch, seed: int) -> tuple[FakeCuda, Run]:
    gpu = FakeCuda(patch, seed)
    return gpu, Run(Recorder(toy(gpu.queue, CPU), CPU), gpu.queue, CPU, seed)


@pytest.mark.parametrize("ahead", [0, 1, 6])
@pytest.mark.parametrize("seed", range(12))
def test_any_order_that_events_allow(seed: int, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, run = fake_run(monkeypatch, seed)
    run.steps(40, [(3, 2), (4, 2), (2, 2), (3, 7)], ahead, foreign=0.2)
    assert len(gpu.graphs) == 2 * 3, "two of each shape: four rows or two, two pages or eight"
    run.steps(60, [(3, 2), (2, 2)], ahead, foreign=0.1, rests=0.4)
    assert len(gpu.graphs) == 2 * 5, "and of rests: four rows or two"


class _Deaf:
    """An event that was never recorded."""

    mark = None

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


@pytest.mark.parametrize("event", ["copied", "done", "fetched"])
def test_every_event_is_needed(event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(seed: int) -> bool:
        with monkeypatch.context() as patch:
            _, run = fake_run(patch, seed)
            recorder = run.recorder
            run.steps(4, [(3, 2)], 1)
            for owner in recorder._turns if event == "fetched" else recorder._graphs.values():
                setattr(owner, event, _Deaf())
            try:
                run.steps(30, [(3, 2)], 6)
            except AssertionError:
                return True
            return False

    assert any(wrong(seed) for seed in range(12))


def test_between_two_graphs_there_are_only_events(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, run = fake_run(monkeypatch, 0)
    run.steps(5, [(3, 2)], 1)
    gpu.is_late = True
    run.steps(1, [(3, 2)], 1)
    for _ in range(3):
        before = len(gpu.main.works)
        inputs = step_inputs(run.rng, 3, 2, 4, 9)
        sampled, _ = run.recorder(inputs, run.tokens, EMPTY)
        recording: Any = next(r for r in run.recorder._graphs.values() if r.sampled is sampled is not None)
        assert gpu.main.works[before + 1 :] == recording.graph.works
        run.tokens = recording.sampled.tokens


def test_tokens_that_no_graph_wrote_last_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they look the same, and where the step before failed."""
    _, run = fake_run(monkeypatch, 1)
    run.steps(4, [(4, 2)], 0)
    assert run.tokens is not None and run.values is not None
    run.tokens = torch.from_numpy(run.values.astype(np.int32) + 1)
    run.values = run.values + 1
    run.steps(3, [(4, 2)], 0)

    other = next(r for (_, turn), r in run.recorder._graphs.items() if turn != run.recorder._turn)
    with monkeypatch.context() as patch:
        patch.setattr(other.graph, "replay", partial(_fail, RuntimeError("no device")))
        with pytest.raises(RuntimeError, match="no device"):
            run.steps(1, [(4, 2)], 0)
    run.steps(5, [(4, 2)], 0)


def _fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("call", [0, 1, 2], ids=["direct", "first recording", "second recording"])
def test_a_failing_step_leaves_nothing_half_made(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, run = fake_run(monkeypatch, 2)
    compute = run.recorder._compute
    calls: list[int] = []

    def failing(*args: Any) -> Any:
        calls.append(len(calls))
        result = compute(*args)
        if calls[-1] == call:
            raise RuntimeError("out of memory")
        return result

    run.recorder._compute = failing
    run.steps(call, [(3, 2)], 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.steps(1, [(3, 2)], 1)
    assert gpu.current is gpu.main, "what comes next must not run on the stream of the recording"
    assert sum(r.graph is not None for r in run.recorder._graphs.values()) == max(0, call - 1)
    run.steps(8, [(3, 2), (3, 7)], 1)


def test_memory_that_torch_keeps_is_given_back_for_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, run = fake_run(monkeypatch, 3)
    compute = run.recorder._compute
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(gpu.graphs)))

    def short(*args: Any) -> Any:
        result = compute(*args)
        if gpu.capturing is not None and len(gpu.graphs) == 2 and not emptied:
            raise torch.OutOfMemoryError
        return result

    run.recorder._compute = short
    run.steps(20, [(3, 2)], 1)
    assert emptied == [2] and len(gpu.graphs) == 3, "one recording of two was made again"
    assert all(r.graph is not None for r in run.recorder._graphs.values())


def test_it_goes_with_its_last_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with it the memory of its graphs: neither it nor its steps leave cycles to Python's collector."""
    _, run = fake_run(monkeypatch, 4)
    gone = weakref.ref(run.recorder)
    run.steps(2, [(3, 2)], 1)  # whatever is imported by then
    gc.collect()
    gc.disable()
    try:
        run.steps(12, [(3, 2), (3, 7)], 1, rests=0.4)
        del run
        assert gone() is None
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_what_a_graph_depends_on() -> None:
    inputs = step_inputs(random.Random(0), 3, 2, 0, 1)
    again = step_inputs(random.Random(1), 4, 2, 0, 5)
    key, arrays = _flattened(inputs)
    assert key == _flattened(again)[0] and hash(key) == hash(_flattened(again)[0]), "numbers in arrays do not matter"
    assert len(arrays) == len({id(x) for x in arrays}) == 15
    queries, sampling = inputs.batch.queries, inputs.sampling
    assert sampling is not None
    others = [
        step_inputs(random.Random(0), 5, 2, 0, 1),
        step_inputs(random.Random(0), 3, 5, 0, 1),
        replace(inputs, token_source=None),
        replace(inputs, token_source=inputs.batch.tokens),  # an array that stands in two places
        replace(inputs, batch=replace(inputs.batch, tokens=inputs.batch.tokens.astype(np.int64))),
        replace(inputs, batch=replace(inputs.batch, queries=replace(queries, context_lens=(1, 2, 3, 4)))),
        replace(inputs, sampling=replace(sampling, all_greedy=False)),
        replace(inputs, sampling=replace(sampling, num_logprobs=0)),
    ]
    assert len({key, *(_flattened(other)[0] for other in others)}) == len(others) + 1


def test_arrays_of_all_kinds_in_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, 0)
    arrays = [
        np.array([[1, 2**32 - 1]], np.uint32),
        np.zeros((0, 3), np.int32),
        np.array([0.5], np.float32),
        np.arange(5, dtype=np.int32)[::2],
    ]
    layout = Layout(arrays)
    for x, packed in zip(arrays, layout.views(layout.pack(arrays)), strict=True):
        np.testing.assert_array_equal(packed.numpy(), x)
        assert packed.data_ptr() % 16 == 0 or x.size == 0
    assert Layout([]).pack([]).shape == (1,)
