"""Every command of `clsa bench` at tiny sizes: a table, then one JSON line, and a file of the same."""

from __future__ import annotations

import gc
import itertools
import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from typer.testing import CliRunner

from clsa import spec
from clsa.bench import timing
from clsa.bench.engine import checked_step, decoding_engine, filled_state, fitting_pages
from clsa.bench.op_cases import EACH_CONTEXT, OPS, OpInputs
from clsa.bench.paper import end_to_end
from clsa.bench.random_arrays import random_params
from clsa.bench.sizes import PLANS, plan_config
from clsa.bench.steps import _time_prompts
from clsa.errors import ClsaError
from clsa.ops import Ops
from clsa_cli.main import app

TINY = ("--sizes", "tiny", "--backend", "numpy", "--seconds", "0.001", "--tokens-per-step", "64", "--no-peers")
CEILINGS = timing.Ceilings(1e10, "a test", 1e10)  # measuring them takes seconds
PLACES = ("--contexts", "100,130", "--batches", "2")


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.bench.bench.measure_ceilings", lambda *_: CEILINGS)


def run(*arguments: str) -> tuple[Any, dict[str, Any]]:
    """The result, and the JSON of its last line."""
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.stderr
    return result, json.loads(result.stdout.splitlines()[-1])


def test_ops(tmp_path: Path) -> None:
    path = tmp_path / "results" / "ops.json"
    result, got = run("ops", *TINY, "--contexts", "100", "--batches", "2", "--output", str(path))
    assert [row["op"] for row in got["rows"]] == list(OPS)
    assert all(row["seconds"] > 0 and row["floor_share"] > 0 for row in got["rows"])
    assert {row["clock"] for row in got["rows"]} == {timing.HOST_CLOCK}
    assert json.loads(path.read_text()) == got
    assert {"command", "commit", "versions", "machine", "dtype", "sizes", "ceilings"} <= set(got)
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + len(OPS) + 1  # heads, rows, JSON
    assert "gather_attention" in lines[2]


def test_decode() -> None:
    _, got = run("decode", *TINY, *PLACES)
    rows = {(row["plan"], row["context"]): row for row in got["rows"]}
    assert set(rows) == {(plan, context) for plan in PLANS for context in (100, 130)}
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(2 / row["step_seconds"])
        assert row["floor_seconds"] == row["floor_bytes"] / CEILINGS.read
        assert row["forward_seconds"] > 0 and row["note"] == ""


def test_prefill_long_and_packed() -> None:
    _, got = run("prefill", *TINY, "--contexts", "128", "--short", "30", "--plans", "transformer,clsa")
    assert [(r["plan"], r["prompts"], r["prompt_tokens"]) for r in got["rows"]] == [
        (plan, *shape) for plan in ("transformer", "clsa") for shape in ((1, 128), (4, 30))
    ]
    assert all(row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"]) for row in got["rows"])


@pytest.mark.parametrize("rate", ["0", "200"])
def test_serve(rate: str) -> None:
    load = ("--requests", "6", "--input-tokens", "20", "--output-tokens", "4", "--max-num-seqs", "3", "--rate", rate)
    _, got = run("serve", *TINY, *load, "--plans", "clsa")
    (row,) = got["rows"]
    assert row["requests"] == 6
    assert 0 < row["ttft_p50"] <= row["ttft_p99"] <= row["seconds"]
    assert 0 < row["itl_p50"] <= row["itl_p90"] <= row["itl_p99"]


def test_paper() -> None:
    _, got = run("paper", *TINY, "--contexts", "100", "--batches", "2", "--output-share", "0.5")
    assert [row["plan"] for row in got["rows"]] == list(PLANS)
    assert "extrapolated" in got["end_to_end"]
    for row in got["rows"]:
        step = (row["step_seconds"] + row["end_step_seconds"]) / 2
        seconds = 2 * 100 / row["prefill_tokens_per_second"] + 50 * step
        assert row["end_to_end_tokens_per_second"] == pytest.approx(2 * 50 / seconds)
        parts = sum(row[f"layer_{part}_seconds"] for part in ("mlp", "attention", "routing"))
        assert row["layer_total_seconds"] == pytest.approx(parts)
    routing = {row["plan"]: row["layer_routing_seconds"] for row in got["rows"]}
    assert routing["transformer"] == routing["yoco"] == 0
    assert routing["dsa"] == pytest.approx(4 * routing["clsa"])  # 4 layers route, or 1


def test_end_to_end_by_hand() -> None:
    # 32 prompts of 128K at 200,000 a second take 21.0 s, 10,486 steps of 3.1 ms on average 32.5 s.
    assert end_to_end(32, 131072, 10_486, 200_000.0, 3.0e-3, 3.2e-3) == pytest.approx(6272, rel=1e-3)
    assert end_to_end(32, 131072, 10_486, None, 3.0e-3, 3.2e-3) is None


def test_ops_that_do_not_depend_on_the_context_are_timed_once() -> None:
    _, got = run("ops", *TINY, "--contexts", "64,100", "--batches", "1")
    assert [(row["op"], row["context"]) for row in got["rows"]] == [
        *((op, 64) for op in OPS),
        *((op, 100) for op in EACH_CONTEXT),
    ]


def test_capacity() -> None:
    _, got = run("capacity", *TINY, "--contexts", "100", "--max-batch", "3", "--plans", "transformer,clsa")
    assert [(row["plan"], row["batch"]) for row in got["rows"]] == [("transformer", 3), ("clsa", 3)]
    assert got["rows"][0]["ratio"] == 1 and got["rows"][0]["state_bytes"] > got["rows"][1]["state_bytes"]


def test_scheduler() -> None:
    _, got = run("scheduler", "--running", "4", "--waiting", "20", "--steps", "100")
    assert [row["load"] for row in got["rows"]] == ["decode", "arrivals", "arrivals, prefix cache"]
    assert all(0 < row["median_seconds"] <= row["p99_seconds"] for row in got["rows"])
    assert {row["target_seconds"] for row in got["rows"]} == {50e-6}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("decode", "--contexts", "8k"), "--contexts must be integers"),
        (("decode", "--batches", "0"), "batches must be between 1"),
        (("decode", "--plans", "clsa,mamba"), "plans must be among"),
        (("ops", "--sizes", "7b", "--backend", "numpy"), "sizes must be one of"),
        (("ops", "--seconds", "nan"), "seconds must be a finite number"),
        (("serve", "--rate", "-1", "--backend", "numpy", "--sizes", "tiny"), "rate must be between"),
        (("scheduler", "--running", "0"), "running must be between"),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert sentence in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


# -- what the figures rest on --------------------------------------------------------------------------------


def test_random_data_has_no_zeros_and_no_equal_rows() -> None:
    config = plan_config("tiny", "clsa", 1 << 14)
    pages = 150  # more rows than one random block has
    state = filled_state(spec, config, "float32", pages, 3)
    for memory in state.memories:
        for array in (memory.k, memory.v, memory.k_idx):
            assert array is not None
            flat = array.reshape(len(array), -1)
            assert len(flat) == pages * 64 and len(np.unique(flat, axis=0)) == len(flat)
            assert 0.9 < flat.std() < 1.1 and (flat != 0).mean() > 0.999
    for window in state.windows:
        assert len(np.unique(window.k.reshape(len(window.k), -1), axis=0)) == 3 * config.sliding_window
    weights = random_params(spec, config, "float32")["lm_head"]
    assert len(np.unique(weights, axis=0)) == len(weights) and 0.015 < weights.std() < 0.025


@pytest.mark.parametrize("pages", [12, 5])
def test_an_engine_begins_behind_its_prompts(pages: int) -> None:
    """Also where its sequences have to share pages: nothing is computed for the prompts, and steps run."""
    config = plan_config("tiny", "clsa", 256)
    state = filled_state(spec, config, "float32", pages, 3)
    params = random_params(spec, config, "float32")
    engine = decoding_engine(spec, params, config, "float32", state, pages, [190, 191, 192])
    assert checked_step(engine) == []  # the first step is under way
    for _ in range(3):
        deltas = checked_step(engine)
        assert len(deltas) == 3 and all(delta.text for delta in deltas)
        for delta in deltas:
            assert all(0 <= page < pages for page in delta.request.pages)
    assert [len(request.pages) for request in engine.scheduler._running] == [4, 4, 4]  # each crossed 192 tokens


def test_a_failed_request_ends_the_benchmark() -> None:
    config = plan_config("tiny", "clsa", 256)
    params = random_params(spec, config, "float32")
    broken = dict(params) | {"norm": params["norm"] * np.nan}
    engine = decoding_engine(spec, broken, config, "float32", filled_state(spec, config, "float32", 8, 1), 8, [100])
    with pytest.raises(ClsaError, match="not finite"):
        for _ in range(3):
            checked_step(engine)


def test_inputs_are_rotated_and_pages_differ() -> None:
    inputs = OpInputs(spec, plan_config("tiny", "clsa", 256), "float32", 100, 2)
    (case,) = inputs.cases(("select",))
    assert case.num_inputs > 1
    first, second = (case.run(i) for i in range(2))
    assert not np.intersect1d(first.rows, second.rows[second.rows >= 0]).size


def test_times_use_every_input_and_wait() -> None:
    seen: list[int] = []

    def call(i: int) -> np.ndarray:
        seen.append(i)
        return np.ones((1, 1))

    times = timing.Stopwatch(spec, None, 0.001).time(call, 3)
    assert times.clock == timing.HOST_CLOCK and len(times.samples) >= 3
    assert seen[:3] == [0, 1, 2] and set(seen[4:]) == {0, 1, 2}
    assert times.median > 0 and math.isfinite(times.spread)


def test_a_device_timer_is_used_and_named() -> None:
    def device(run: Any, num_inputs: int, seconds: float) -> tuple[str, list[float]]:
        return f"{num_inputs} inputs, {seconds} s", [3.0, 1.0, 2.0]

    times = timing.Stopwatch(spec, device, 0.5).time(lambda _: np.ones((1, 1)), 2)
    assert (times.median, times.clock) == (2.0, "2 inputs, 0.5 s")


def test_ceilings_are_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_MATRIX_BYTES", (1 << 20, 1 << 20))
    got = timing.measure_ceilings(spec, timing.Stopwatch(spec, None, 0.001), "float32")
    assert 1e7 < got.read < 1e14 and 1e7 < got.matmul < 1e16
    assert got.read_by in ("linear, 1 row", "linear, 8 rows", "x + x")


def test_a_long_prefill_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.bench.steps.WHOLE_SECONDS", 0.0)
    monkeypatch.setattr("clsa.bench.steps._time_prompts", lambda *_: pytest.fail("it ran"))
    _, got = run("prefill", *TINY, "--contexts", "256", "--plans", "clsa", "--short", "256")
    (row,) = got["rows"]
    assert "estimated" in row["note"] and row["tokens_per_second"] == pytest.approx(256 / row["seconds"])


@pytest.mark.parametrize("seconds, rehearsals", [(0.1, 3), (2.0, 1)])
def test_prompts_rehearse_until_what_they_record_is_recorded(
    seconds: float, rehearsals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second and the third of a shape record it; those that take seconds anyway may."""
    prompts: list[list[int]] = []
    engine = SimpleNamespace(make_request=lambda prompt, _: prompts.append(prompt), add=lambda _: None, has_work=False)
    clock = itertools.count(step=seconds)
    monkeypatch.setattr("clsa.bench.steps.make_engine", lambda *_, **__: engine)
    monkeypatch.setattr("clsa.bench.steps.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    bench: Any = SimpleNamespace(
        ops=spec, dtype="float32", stored=None, settings=SimpleNamespace(tokens_per_step=64, seconds=0.0)
    )
    times = _time_prompts(bench, plan_config("tiny", "clsa", 100), {}, 1, 10, 1)
    assert times.samples == pytest.approx([seconds]) and len(prompts) == rehearsals + 1
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts), "a prefix cache would know them"


def test_recorded_steps_are_let_go_before_memory_is_measured() -> None:
    class Recorded:
        """Refers to what records it, as a CUDA graph does."""

        def __init__(self, compute: Any) -> None:
            self.compute = compute

        def __call__(self, *arguments: Any) -> Any:
            return self.compute(*arguments)

    config = plan_config("tiny", "clsa", 256)
    ops = cast(Ops, SimpleNamespace(**(vars(spec) | {"record": Recorded})))
    engine = decoding_engine(
        ops,
        random_params(spec, config, "float32"),
        config,
        "float32",
        filled_state(spec, config, "float32", 8, 1),
        8,
        [100],
    )
    checked_step(engine)
    runner = weakref.ref(engine._runner)
    del engine
    gc.disable()
    try:
        fitting_pages(spec, config, "float32", 1, 1)
    finally:
        gc.enable()
    assert runner() is None
