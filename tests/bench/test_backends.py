"""The same commands where an array library computes, and its peers beside it."""

from __future__ import annotations

import itertools
import json
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from clsa.backend import load_backend
from clsa.bench import timing
from clsa.bench.op_cases import OpInputs
from clsa.bench.sizes import PLANS, plan_config
from clsa.bench.step_gate import step_gate
from clsa_cli.main import app


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.bench.bench.measure_ceilings", lambda *_: timing.Ceilings(1e10, "a test", 1e10))


@pytest.mark.parametrize(
    ("backend", "library", "peer"),
    [
        pytest.param("mlx", "mlx_lm", "mlx-lm", marks=pytest.mark.mlx),
        pytest.param("cuda", "transformers", "transformers"),
    ],
)
def test_decode_and_prefill_beside_a_peer(backend: str, library: str, peer: str) -> None:
    pytest.importorskip(library)
    tiny = ["--sizes", "tiny", "--backend", backend, "--device", "cpu", "--seconds", "0.001", "--contexts", "70"]
    for command in (["decode", "--batches", "2"], ["prefill", "--short", "35"]):
        result = CliRunner().invoke(app, ["bench", *command, *tiny, "--plans", "clsa"])
        assert result.exit_code == 0, result.stderr
        rows = json.loads(result.stdout.splitlines()[-1])["rows"]
        assert [row["plan"].split()[0] for row in rows] == ["clsa"] * (len(rows) // 2) + [peer] * (len(rows) // 2)
        assert all(row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.mlx
def test_ops_on_mlx() -> None:
    arguments = ["--sizes", "tiny", "--backend", "mlx", "--device", "cpu", "--seconds", "0.001", "--contexts", "100"]
    result = CliRunner().invoke(app, ["bench", "ops", *arguments, "--batches", "2"])
    assert result.exit_code == 0, result.stderr
    assert all(row["seconds"] for row in json.loads(result.stdout.splitlines()[-1])["rows"])


def test_ops_beside_torch() -> None:
    arguments = ["--sizes", "tiny", "--backend", "cuda", "--device", "cpu", "--seconds", "0.001", "--contexts", "100"]
    result = CliRunner().invoke(app, ["bench", "ops", *arguments, "--batches", "2"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    theirs = [row for row in rows if row["by"].startswith("torch ")]
    assert [row["op"] for row in theirs] == ["select", "gather_attention", "dense_attention", "linear", "lm_head"]
    assert all(row["seconds"] > 0 and "wrong" not in row for row in rows)


def test_a_peer_that_is_wrong_or_does_not_fit_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from clsa_cuda import bench_op_peers

    arguments = ["--sizes", "tiny", "--backend", "cuda", "--device", "cpu", "--seconds", "0.001", "--contexts", "100"]
    attend = bench_op_peers._attend
    monkeypatch.setattr(bench_op_peers, "_attend", lambda *given: attend(*given) * 1.01)
    monkeypatch.setattr(bench_op_peers, "host_memory_stats", lambda: {"free": 1000})
    result = CliRunner().invoke(app, ["bench", "ops", *arguments, "--batches", "2"])
    assert result.exit_code == 0, result.stderr  # our own are right
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    theirs = {row["op"]: row for row in rows if row["by"].startswith("torch ")}
    assert "relative error" in theirs["gather_attention"]["wrong"] and theirs["gather_attention"]["seconds"] is None
    assert "GB" in theirs["dense_attention"]["note"] and "seconds" not in theirs["dense_attention"]


@pytest.mark.parametrize("backend", ["cuda", pytest.param("mlx", marks=pytest.mark.mlx)])
@pytest.mark.parametrize("plan", PLANS)
def test_the_gate_of_a_plan_passes(backend: str, plan: str) -> None:
    ops = load_backend(backend, "cpu")[0]
    assert step_gate(ops, plan_config("tiny", plan, 256), "float32") is None


class PagedAttention:
    """FlashInfer's decode wrapper as documented, in plain torch: pages by indptr and indices, last page lengths."""

    def __init__(self, workspace: Any, layout: str, use_tensor_cores: bool) -> None:
        assert layout == "NHD" and workspace.nbytes >= 128 << 20

    def plan(self, indptr: Any, indices: Any, last: Any, *sizes: int, q_data_type: Any) -> None:
        self.lists = [indices[a:b].long() for a, b in itertools.pairwise(indptr.tolist())]
        self.last, self.sizes = last.tolist(), sizes

    def run(self, q: Any, cache: Any) -> Any:
        import torch

        heads, kv_heads, head_dim, page_size = self.sizes
        assert all(x.shape[1:] == (page_size, kv_heads, head_dim) for x in cache) and q.shape[1:] == (heads, head_dim)
        out = []
        for pages, last, asked in zip(self.lists, self.last, q, strict=True):
            rows = len(pages) * page_size - page_size + last
            k, v = (x[pages].flatten(0, 1)[:rows].transpose(0, 1) for x in cache)
            out.append(torch.nn.functional.scaled_dot_product_attention(asked[:, None], k, v, enable_gqa=True)[:, 0])
        return torch.stack(out)


@pytest.mark.parametrize("op", ["dense_attention", "gather_attention"])
@pytest.mark.parametrize("context", [40, 64, 130])
def test_flashinfer_gets_the_same_rows(op: str, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from clsa_cuda.bench_op_peers import FlashInferPeer

    module = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PagedAttention)
    monkeypatch.setitem(sys.modules, "flashinfer", cast(Any, module))
    ops = load_backend("cuda", "cpu")[0]
    (case,) = OpInputs(ops, plan_config("tiny", "clsa", 256), "float32", context, 3).cases((op,))
    call = FlashInferPeer("1.0").prepare(op, case.arguments[0])
    assert call is not None and case.gate(call()) is None
    assert FlashInferPeer("1.0").prepare("select", case.arguments[0]) is None
