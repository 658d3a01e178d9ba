"""The scripts that time whole decode steps on a GPU: that they run, on the CPU, and let go of what they have timed."""

from __future__ import annotations

import gc
import importlib
import os
import weakref
from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import clsa_cuda
from clsa.bench.sizes import plan_config
from clsa_cuda.ops import TorchOps
from clsa_cuda.recorder import Recorder
from tests.cuda.fake_cuda import CPU, on_the_cpu

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`scripts/gpu_decode.py` with tiny models on the CPU, whose steps are recorded and replayed all the same."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("gpu_decode")
    backend, randn = clsa_cuda.backend, torch.randn
    monkeypatch.setattr(clsa_cuda, "backend", SimpleNamespace(open=lambda device: backend.open("cpu")))
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: randn(*shape, dtype=kwargs["dtype"]))
    monkeypatch.setattr(module, "config_4b", lambda plan: plan_config("tiny", plan, 1024))
    monkeypatch.setattr(module, "timed", lambda run, repeats: [0.001 for _ in range(repeats) if run() is None])
    on_the_cpu(monkeypatch)
    monkeypatch.setattr(TorchOps, "record", lambda ops, compute: Recorder(compute, CPU))  # and no list of them
    return module


@pytest.mark.parametrize("plan", ["clsa", "yoco", "transformer"])
def test_steps_are_timed_and_let_go(plan: str, decode: ModuleType) -> None:
    bench: Any = decode.Bench(plan, 300, 3, 1)
    times = bench.run(5)
    assert times["graph_ms"] == 1.0 and times["engine_step_ms"] > 0
    graphs = [recording.graph for recording in bench.recorder._graphs.values()]
    assert len(graphs) == 2 and all(graphs), "two turns of one shape"
    del graphs
    gone = weakref.ref(bench.params["norm"])
    gc.disable()
    try:
        del bench
        assert gone() is None, "the next case needs its memory"
    finally:
        gc.enable()


def test_arrivals_end_with_the_last_step_read(decode: ModuleType) -> None:
    bench: Any = decode.Bench("clsa", 300, 2, 1)
    read: list[int] = []
    fetch = bench.ops.fetch

    def counted(arrays: Any) -> Any:
        wait, step = fetch(arrays), len(read)
        read.append(0)

        def waited() -> Any:
            read[step] += 1
            return wait()

        return waited

    bench.ops = SimpleNamespace(fetch=counted)
    with closing(bench.arrivals()) as arrivals:
        times = list(islice(arrivals, 4))
    assert read == [1] * 5, "one step ahead, and each is waited for once"
    assert all(a < b for a, b in pairwise(times))


def test_what_lasts(decode: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sustained: Any = importlib.import_module("gpu_sustained")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '650.5, 1980, 0x4'\nprintf '640.5, 1970, 0x0\\n630.0, 19'\nexec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(sustained.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sustained, "FIRST", 0.2)
    monkeypatch.setattr(sustained, "SETTLED", 0.0)
    row = sustained.measure("clsa", 2, 0.5)
    assert (row["watts"], row["sm_mhz"], row["power_capped_share"]) == (645.5, 1975.0, 0.5), "a cut line is left out"
    assert row["joules_per_token"] == pytest.approx(645.5 * row["settled_ms"] / 1e3 / 2)
    assert row["first_ms"] > 0 and row["steps"] > 2
