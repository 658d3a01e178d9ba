"""The gate: a wrong op, and a plan with a wrong step, get no figure."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from typer.testing import CliRunner

from clsa import spec
from clsa.bench import runs, timing
from clsa.bench.bench import Bench, Settings
from clsa.bench.op_cases import OpInputs
from clsa.bench.paper import bench_paper
from clsa.bench.serve import Load, bench_serve
from clsa.bench.sizes import PLANS, plan_config
from clsa.bench.step_gate import step_gate
from clsa.ops import Ops
from clsa_cli.main import app

TINY = ("--sizes", "tiny", "--backend", "numpy", "--seconds", "0.001", "--tokens-per-step", "64", "--no-peers")


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.bench.bench.measure_ceilings", lambda *_: timing.Ceilings(1e10, "a test", 1e10))


def changed(op: str, change: Any) -> Ops:
    """The specification with one op whose result is changed."""

    def wrong(*arguments: Any) -> Any:
        return change(getattr(spec, op)(*arguments))

    return cast(Ops, SimpleNamespace(**(vars(spec) | {op: wrong})))


def last_swapped(selection: Any) -> Any:
    """A selection that takes position 0 or 1 in place of its first: right in form, wrong in content."""
    positions, rows = selection.positions.copy(), selection.rows.copy()
    free = next(p for p in range(100) if p not in positions[0])
    order = np.argsort(np.append(positions[0][1:], free))
    positions[0] = np.append(positions[0][1:], free)[order]
    return type(selection)(positions, rows, selection.lengths)


WRONG = {
    "select: another position": ("select", last_swapped),
    "select: descending": ("select", lambda s: type(s)(s.positions[:, ::-1], s.rows[:, ::-1], s.lengths)),
    "select: lengths": ("select", lambda s: type(s)(s.positions, s.rows, s.lengths - 1)),
    "gather_attention": ("gather_attention", lambda out: out * 1.001),
    "dense_attention: NaN": ("dense_attention", lambda out: out * np.nan),
    "attend_window: heads": ("attend_window", lambda out: (out[0][:, ::-1], out[1])),
    "attend_window: the ring": ("attend_window", lambda out: half_the_ring(out)),
    "linear": ("linear", lambda out: out + 1e-3),
    "close_layer": ("close_layer", lambda out: out + 1e-3),
    "sample": ("sample", lambda out: type(out)(out.tokens + 1, None, None, None)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_op_gets_no_figure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, change = WRONG[name]
    monkeypatch.setattr("clsa.bench.bench.load_backend", lambda *_: (changed(op, change), ""))
    settings = Settings(sizes="tiny", contexts=(100,), batches=(2,), seconds=0.001, dtype="float32")
    report = runs.bench_ops(Bench(settings, lambda _: None))
    wrong = [row for row in report.rows if "wrong" in row]
    touched = {"linear": ["linear", "lm_head"], "sample": ["sample", "sample_top_p"]}.get(op, [op])
    assert [row["op"] for row in wrong] == touched
    assert all(row["seconds"] is None and row["note"].startswith("WRONG") for row in wrong)
    assert report.wrong == len(wrong)


def test_a_wrong_op_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.bench.bench.load_backend", lambda *_: (changed("linear", lambda out: out + 1), ""))
    result = CliRunner().invoke(app, ["bench", "ops", *TINY, "--contexts", "64", "--batches", "1"])
    assert result.exit_code == 1
    assert "2 results did not agree" in result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["rows"][-3]["seconds"] is None


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_passes_its_gate(plan: str) -> None:
    assert step_gate(spec, plan_config("tiny", plan, 256), "bfloat16") is None


def half_the_ring(out: Any) -> Any:
    """Wrong state, which only the next step can see."""
    return out[0], type(out[1])(out[1].k * 0.5, out[1].v, out[1].size)


STEPS = {
    "select: another position": ("select", last_swapped, "clsa", "query 0"),
    "gather_attention": ("gather_attention", lambda out: out * 1.01, "dsa", "prefill: relative error"),
    "dense_attention": ("dense_attention", lambda out: out * 1.01, "yoco", "prefill: relative error"),
    "attend_window: the ring": ("attend_window", half_the_ring, "clsa", "decode: "),
    "close_layer": ("close_layer", lambda out: out + 1e-3, "transformer", "prefill: relative error"),
    "take_selection": (
        "take_selection",
        lambda s: type(s)(s.positions[::-1], s.rows[::-1], s.lengths),
        "indexcache",
        "prefill: relative error",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_wrong_step_gets_no_figure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, change, plan, sentence = STEPS[name]
    monkeypatch.setattr("clsa.bench.bench.load_backend", lambda *_: (changed(op, change), ""))
    settings = Settings(sizes="tiny", contexts=(100,), batches=(2,), plans=(plan,), seconds=0.001, dtype="float32")
    for run_it in (runs.bench_decode, lambda b: bench_paper(b, 0.1), lambda b: runs.bench_capacity(b, 2)):
        report = run_it(Bench(settings, lambda _: None))
        (row,) = report.rows
        assert sentence in row["wrong"] and row["note"].startswith("WRONG") and report.wrong
        assert not row.get("tokens_per_second") and not row.get("decode_tokens_per_second")
    for report in (
        runs.bench_prefill(Bench(settings, lambda _: None), 50),
        bench_serve(Bench(settings, lambda _: None), Load(requests=2, input_tokens=9, max_num_seqs=2)),
    ):
        assert report.wrong == len(report.rows) and all("seconds" not in r or not r["seconds"] for r in report.rows)


def test_ops_are_checked_at_the_place_of_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that is wrong only where the context is long."""

    def dense(q: Any, memory: Any, queries: Any) -> Any:
        return spec.dense_attention(q, memory, queries) * (1.1 if max(queries.context_lens) == 130 else 1.0)

    ops = cast(Ops, SimpleNamespace(**(vars(spec) | {"dense_attention": dense})))
    monkeypatch.setattr("clsa.bench.bench.load_backend", lambda *_: (ops, ""))
    settings = Settings(sizes="tiny", contexts=(100, 130), batches=(2,), plans=("transformer",), seconds=0.001)
    for report in (
        runs.bench_decode(Bench(settings, lambda _: None)),
        runs.bench_prefill(Bench(settings, lambda _: None), 1000),
    ):
        right, wrong = report.rows
        assert right["tokens_per_second"] and "dense_attention" in wrong["wrong"] and report.wrong == 1


@pytest.mark.mlx
def test_far_positions_may_turn_as_far_as_float32_rounds_their_angles() -> None:
    """And no further: a right result at 32K passes in float32, and one that is turned by a hundredth does not."""
    bench = Bench(Settings(backend="mlx", device="cpu", sizes="tiny", contexts=(32768,), batches=(1,)), lambda _: None)
    inputs = OpInputs(bench.ops, bench.config("clsa", 40000), "float32", 32768, 1, max_sets=1)
    (case,) = inputs.cases(("attend_window",))
    attended, window = case.run(0)
    assert case.gate((attended, window)) is None
    assert "relative error" in str(case.gate((attended * 1.01, window)))
