"""`clsa bench` on memories and weights in 8 bits: every figure is of what was asked for, and none is of a wrong one."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from typer.testing import CliRunner

from clsa import spec
from clsa.backend import load_backend
from clsa.bench import runs, timing
from clsa.bench.bench import Bench, Settings
from clsa.bench.floors import decode_bytes, op_bytes
from clsa.bench.sizes import PLANS, plan_config
from clsa.bench.step_gate import step_gate
from clsa.bench.steps import page_room
from clsa.config import FP8, MemoryDtypes
from clsa.errors import ConfigError
from clsa.ops import Float8Weight, Ops
from clsa_cli.main import app

TINY = ("--sizes", "tiny", "--seconds", "0.001", "--tokens-per-step", "64", "--contexts", "100", "--batches", "2")
MEMORY = ("--kv-dtype", "fp8", "--index-dtype", "fp8")
BOTH = MemoryDtypes(FP8, FP8)


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.bench.bench.measure_ceilings", lambda *_: timing.Ceilings(1e10, "a test", 1e10))


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.stderr
    got: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return got


@pytest.mark.parametrize("backend", ["numpy", "cuda"])
def test_floors_and_results_say_what_is_kept_in_8_bits(backend: str) -> None:
    options = (*TINY, *MEMORY, "--weight-dtype", "fp8", "--backend", backend, "--device", "cpu", "--dtype", "float32")
    itemsize = load_backend(backend, "cpu")[0].itemsize("float32")
    ops = run("ops", *options)
    config = plan_config("tiny", "clsa", 100)
    for row in ops["rows"]:
        assert row["floor_bytes"] == op_bytes(row["op"], config, 100, 2, itemsize, BOTH, FP8)
        assert row["by"] == "clsa", "what others offer takes no such inputs"
    steps = run("decode", *options, "--plans", "yoco,clsa", "--no-peers")
    for row in steps["rows"]:
        config = plan_config("tiny", row["plan"], page_room(100))
        assert row["floor_bytes"] == decode_bytes(config, 100, 2, itemsize, BOTH, FP8).total
    for got in (ops, steps, run("prefill", *options, "--plans", "clsa", "--no-peers")):
        assert (got["kv_dtype"], got["index_dtype"], got["weight_dtype"]) == (FP8, FP8, FP8)
        assert all("wrong" not in row for row in got["rows"])


def test_capacity_counts_what_a_memory_takes() -> None:
    options = (*TINY, "--backend", "cuda", "--device", "cpu", "--plans", "transformer", "--dtype", "float32")
    plain, kept = (run("capacity", *options, "--max-batch", "2", *more)["rows"][0] for more in ((), MEMORY))
    assert plain["state_bytes"] == 4 * kept["state_bytes"]


@pytest.mark.mlx
def test_a_backend_without_them_says_so() -> None:
    load = ("--requests", "2", "--input-tokens", "80", "--output-tokens", "20")
    assert run("serve", *TINY, *MEMORY, *load, "--backend", "mlx", "--device", "cpu", "--plans", "clsa")
    result = CliRunner().invoke(app, ["bench", "ops", *TINY, "--backend", "mlx", "--weight-dtype", "fp8"])
    assert result.exit_code == 1 and "no fp8 weights" in result.stderr


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv_dtype must be None or 'fp8', got 'int8'"):
        Settings(kv_dtype="int8")
    assert CliRunner().invoke(app, ["bench", "ops", "--index-dtype", "int8"]).exit_code == 2


@pytest.mark.parametrize("backend", ["numpy", "cuda", pytest.param("mlx", marks=pytest.mark.mlx)])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_of_a_plan_passes(backend: str, plan: str, dtype: str) -> None:
    ops = load_backend(backend, "cpu")[0]
    weight_dtype = None if "weights" in ops.no_fp8 else FP8
    assert step_gate(ops, plan_config("tiny", plan, 256), dtype, BOTH, weight_dtype) is None


def without_scales(x: Any, weight: Any) -> Any:
    scaled = isinstance(weight, Float8Weight)
    return spec.linear(x, replace(weight, scales=np.ones_like(weight.scales)) if scaled else weight)


def read_twice(q: Any, memory: Any, *rest: Any) -> Any:
    return spec.gather_attention(q, replace(memory, v=np.asarray(memory.v, np.float64) * 1.01), *rest)


@pytest.mark.parametrize(("op", "change"), [("linear", without_scales), ("gather_attention", read_twice)])
def test_a_wrong_op_gets_no_figure(op: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = cast(Ops, SimpleNamespace(**(vars(spec) | {op: change})))
    monkeypatch.setattr("clsa.bench.bench.load_backend", lambda *_: (wrong, ""))
    settings = Settings(
        sizes="tiny",
        contexts=(100,),
        batches=(2,),
        plans=("clsa",),
        seconds=0.001,
        dtype="float32",
        kv_dtype=FP8,
        weight_dtype=FP8,
    )
    report = runs.bench_ops(Bench(settings, lambda _: None))
    assert [row["op"] for row in report.rows if "wrong" in row] == [op]
