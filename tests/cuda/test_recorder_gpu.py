"""Recorded steps on a GPU; and in the engine, also without one."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import clsa
from clsa.batch import upload
from clsa.ops import Compute, RestInputs
from clsa_cuda import transfer
from clsa_cuda.ops import TorchOps
from clsa_cuda.recorder import Recorder
from tests.cuda.fake_cuda import on_the_cpu
from tests.cuda.toy_steps import Run, toy
from tests.engine import models

PARAMS = [
    clsa.SamplingParams(ignore_eos=True),
    clsa.SamplingParams(ignore_eos=True, temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=3, logprobs=2),
]


def tokens(device: str, params: clsa.SamplingParams) -> list[list[int]]:
    """Of requests that end one after the other; again and again, so that steps with prompts come back too."""
    llm = clsa.load("demo", backend="cuda", device=device, dtype="float32")
    each = [replace(params, max_tokens=count) for count in (5, 24, 11, 30, 17)]
    prompts = ["def f(", "import os", "x = [", "class A", "if a"]
    turns = [prompts[i:] + prompts[:i] for i in range(4)]
    return [out.token_ids for turn in turns for out in llm.generate(turn, each)]


def directly(ops: TorchOps, compute: Compute) -> Compute:
    """The padded steps that a recorder gets, without one."""
    return lambda inputs, *rest: compute(upload(ops, inputs), *rest)


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled"])
def test_the_engine_gets_the_same_tokens(params: clsa.SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TorchOps, "record", directly)
        wanted = tokens("cpu", params)
    made = on_the_cpu(monkeypatch)
    assert tokens("cpu", params) == wanted
    replayed = [r.inputs for recorder in made for r in recorder._graphs.values() if r.graph is not None]
    assert len(replayed) >= 8 and any(isinstance(inputs, RestInputs) for inputs in replayed)


def test_rests_with_a_selection_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer that writes a memory reads what an earlier one has selected."""

    def answers() -> list[list[int]]:
        model = models.folder(layer_types=(models.FULL,) * 4, index_topk_pattern="FSFS")
        llm = models.load("cuda", model, prefix_cache_bytes=0)
        params = clsa.SamplingParams(max_tokens=7, ignore_eos=True)  # rests in both turns
        prompts = [[[7 + i] * 40, list(range(9, 90 + i))] for i in range(8)]
        return [out.token_ids for pair in prompts for out in llm.generate(pair, params)]

    with monkeypatch.context() as patch:
        patch.setattr(TorchOps, "record", directly)
        wanted = answers()
    made = on_the_cpu(monkeypatch)
    assert answers() == wanted
    (recorder,) = made
    rests = [r for r in recorder._graphs.values() if isinstance(r.inputs, RestInputs)]
    assert len(rests) == 2 and all(r.graph is not None and r.inputs.rows.selection is not None for r in rests)


@pytest.mark.cuda
@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled"])
def test_the_engine_gets_the_same_tokens_on_a_gpu(params: clsa.SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = tokens("cuda:0", params)
    monkeypatch.setattr(TorchOps, "record", directly)
    assert tokens("cuda:0", params) == recorded


def gpu_run(device: str, seed: int) -> Run:
    def launch(work: Callable[[], object]) -> object:
        return work()

    where = torch.device(device)
    torch.cuda.set_device(where)
    return Run(Recorder(toy(launch, where), where), launch, where, seed)


@pytest.mark.cuda
@pytest.mark.parametrize("ahead", [0, 1, 6])
def test_on_a_gpu(ahead: int) -> None:
    gpu_run("cuda:0", ahead).steps(200, [(3, 2), (4, 2), (2, 2), (3, 7)], ahead, foreign=0.1, rests=0.2)


@pytest.mark.cuda
def test_samples_can_be_read_while_later_steps_run() -> None:
    """Recordings share memory: what one computes with may lie where an earlier one sampled."""
    run, outward = gpu_run("cuda:0", 5), transfer.streams(torch.device("cuda:0")).outward
    recorder: Any = run.recorder
    compute = recorder._compute

    def with_scratch(*args: Any) -> Any:
        scratch = [torch.full((64,), -7, dtype=torch.int32, device="cuda:0") for _ in range(64)]
        del scratch
        return compute(*args)

    def with_late_copies(*args: Any) -> Any:
        result = recorder(*args)
        with torch.cuda.stream(outward):
            torch.cuda._sleep(2_000_000)
        return result

    recorder._compute, run.recorder = with_scratch, with_late_copies  # type: ignore[assignment]
    run.steps(40, [(3, 2), (3, 7)], 3)


@pytest.mark.cuda
def test_steps_take_no_memory() -> None:
    run = gpu_run("cuda:0", 3)
    run.steps(5, [(3, 2)], 1)
    before = torch.cuda.memory_stats()
    run.steps(50, [(3, 2)], 1)
    after = torch.cuda.memory_stats()
    assert after["allocation.all.allocated"] == before["allocation.all.allocated"]


@pytest.mark.cuda
def test_a_failing_recording_on_a_gpu() -> None:
    run = gpu_run("cuda:0", 4)
    compute, before = run.recorder._compute, torch.cuda.current_stream()

    def failing(*args: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda:0")
        return compute(*args)

    run.recorder._compute = failing
    run.steps(1, [(3, 2)], 1)
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            run.steps(1, [(3, 2)], 1)
    assert torch.cuda.current_stream() == before
    assert all(recording.graph is None for recording in run.recorder._graphs.values())
    run.recorder._compute = compute
    run.steps(20, [(3, 2)], 1)


@pytest.mark.cuda
def test_a_recording_needs_what_torch_keeps() -> None:
    run = gpu_run("cuda:0", 6)
    compute, short = run.recorder._compute, 3 << 30
    gc.collect()  # whatever other tests have left in cycles
    torch.cuda.empty_cache()

    def large(*args: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(short, dtype=torch.uint8, device="cuda:0")
        return compute(*args)

    run.recorder._compute = large
    run.steps(1, [(3, 2)], 1)
    torch.empty(torch.cuda.mem_get_info()[0] - short // 2, dtype=torch.uint8, device="cuda:0")  # kept, not in use
    assert torch.cuda.mem_get_info()[0] < short
    run.steps(20, [(3, 2)], 1)
    assert all(recording.graph is not None for recording in run.recorder._graphs.values())
    assert torch.cuda.mem_get_info()[0] > short, "what torch kept is given back"


@pytest.mark.cuda
def test_threads_and_devices() -> None:
    """Two recorders on each GPU, each in a thread of its own; they record while others replay."""
    devices = [f"cuda:{i}" for i in range(min(2, torch.cuda.device_count()))]
    failures: list[Exception] = []

    def work(device: str, seed: int) -> None:
        try:
            gpu_run(device, seed).steps(150, [(3, 2), (4, 2), (2, 2), (3, 7)], 1, foreign=0.1, rests=0.2)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(device, seed)) for device in devices for seed in (6, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
