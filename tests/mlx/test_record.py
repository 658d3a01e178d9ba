"""Decode steps that MLX compiles, as on Metal, once per shape. On CPU that takes a C++ compiler at run time."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any, cast

import numpy as np
import pytest

import clsa
from clsa.batch import SequenceChunk, pack
from clsa.model import forward, new_state
from clsa.ops import Array, Compute, Ops, Sampled, State, StepInputs
from clsa.plan import make_plan
from clsa.step import pad_decode
from tests.engine import models
from tests.metal.harness.compile import compiler
from tests.mlx.test_state import Growth, model

pytestmark = [pytest.mark.mlx, pytest.mark.skipif(compiler() is None, reason="no C++ compiler")]
mx = pytest.importorskip("mlx.core")

PROMPTS = ["def area(self):\n    return", "import os\n", "class Queue:"]


@pytest.fixture
def ops() -> Ops:
    from clsa_mlx import backend

    return backend.open("cpu")


@pytest.mark.parametrize(
    "params",
    [
        clsa.SamplingParams(max_tokens=12, temperature=0.0),
        clsa.SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=3, logprobs=2),
    ],
    ids=["greedy", "sampled"],
)
def test_the_same_text_as_without(params: clsa.SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    from clsa_mlx import ops
    from clsa_mlx.record import Recorder

    def tokens() -> list[list[int]]:
        llm = clsa.load("demo", backend="mlx", device="cpu")
        return [out.token_ids for out in llm.generate(PROMPTS, params)]

    made: list[Recorder] = []

    def record(compute: Compute) -> Recorder:
        made.append(Recorder(compute))
        return made[-1]

    plain = tokens()
    monkeypatch.setattr(ops, "record", record)
    assert tokens() == plain
    assert 1 <= len(made[0]._steps) <= 3, "three requests of one kind: one shape, or two where not all of them start"


def test_weights_go_with_the_last_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python does not look for cycles."""
    from clsa_mlx import ops
    from clsa_mlx.record import Recorder

    monkeypatch.setattr(ops, "record", Recorder)
    llm = models.load("mlx")
    llm.generate([5, 6, 7], clsa.SamplingParams(max_tokens=5, ignore_eos=True))
    recorder: Any = llm._engine._runner._recorded
    assert recorder._steps
    parts = [weakref.ref(x) for x in (recorder, llm._engine._runner, llm._params["norm"])]
    del recorder
    gc.collect()
    gc.disable()
    try:
        del llm
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()


def test_a_shape_is_compiled_once(ops: Ops) -> None:
    from clsa_mlx.record import Recorder

    traced: list[int] = []

    def compute(inputs: StepInputs, previous: Array | None, state: State) -> tuple[Sampled | None, State]:
        traced.append(inputs.batch.tokens.shape[0])
        tokens = inputs.batch.tokens if previous is None else previous
        return Sampled(tokens[: inputs.batch.tokens.shape[0]] + 1, None, None, None), state

    step = Recorder(compute)
    state = State((), (ops.new_window(1, 1, 1, 8, "float32"),))
    for rows in (1, 2, 3, 4, 2, 1):
        chunks = [SequenceChunk([i], 5, [0], 0, "all") for i in range(rows)]
        inputs = pad_decode(StepInputs(pack(chunks, 4), None, None, None), 16)
        before = None
        for i in range(3):
            sampled, state = step(inputs, before, state)
            assert sampled is not None and state.windows[0].size == 1
            before = sampled.tokens
            assert ops.to_numpy(before)[:rows].tolist() == [n + i + 1 for n in range(rows)]
    assert sorted(traced) == [1, 1, 2, 2, 4, 4], "by padded rows, without and with a sample before"


def greedy(ops: Ops, params: Any, plan: Any) -> Compute:
    def compute(inputs: StepInputs, previous: Array | None, state: State) -> tuple[Sampled | None, State]:
        logits, state = forward(ops, params, plan, inputs.batch, state)
        return Sampled(mx.argmax(logits, axis=1).astype(mx.int32), None, None, None), state

    return compute


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_200_steps_take_no_more_memory_than_the_first(ops: Ops, compiled: bool) -> None:
    """The host runs one step ahead of the device, as the engine does; every layer reads its ring and writes it."""
    from clsa.batch import upload
    from clsa_mlx.record import Recorder

    config, params = model()
    plan = make_plan(config)
    state = new_state(ops, plan, 1 << 17, 512, "float32")
    memory, window = state.memories[0], state.windows[0]
    smallest = min(x.nbytes for x in (memory.k_idx, window.k) if x is not None)
    del memory, window
    compute = greedy(ops, params, plan)
    step: Compute = Recorder(compute) if compiled else lambda inputs, *rest: compute(upload(ops, inputs), *rest)
    previous, position = None, 100
    growths = []
    for steps in (8, 200):  # the first ones compile, and fill whatever is kept
        with Growth() as growth:
            for _ in range(steps):
                chunks = [SequenceChunk([7], position, list(range(b, 12, 2)), 300 + b, "all") for b in (0, 1)]
                inputs = StepInputs(pack(chunks, config.sliding_window), None, None, None)
                sampled, state = step(pad_decode(inputs, 8), previous, state)
                assert sampled is not None
                ops.evaluate(sampled, state)
                if previous is not None:
                    ops.to_numpy(previous)
                previous, position = sampled.tokens, position + 1
        growths.append(growth)
    growth = growths[-1]
    assert growth.bytes < smallest / 4, f"{growth.bytes / 1e6:.1f} MB more in 200 steps of two tokens"
    assert growth.left < 1 << 16, f"{growth.left} bytes were not given back"


def test_another_thread_may_take_over() -> None:
    """MLX's streams belong to threads; the engine leaves nothing on one that another would have to finish."""
    llm = clsa.load("demo", backend="mlx", device="cpu")
    texts: list[str] = []

    def generate() -> None:
        texts.append(llm.generate(PROMPTS[:1], clsa.SamplingParams(max_tokens=4))[0].text)

    generate()
    other = threading.Thread(target=generate)
    other.start()
    other.join()
    generate()
    assert len(texts) == 3 and len(set(texts)) == 1


def test_the_cpu_gets_none(ops: Ops) -> None:
    assert ops.record(cast(Compute, lambda *_: None)) is None


def test_padding_of_the_sample_before() -> None:
    from clsa_mlx.record import _padded

    for rows, padded in ((1, 1), (2, 2), (3, 4), (5, 8)):
        got = np.array(_padded(mx.arange(rows)))
        assert got.shape == (padded,) and got[:rows].tolist() == list(range(rows))
