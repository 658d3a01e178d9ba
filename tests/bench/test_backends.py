"""The same commands where an array library computes, and its peers beside it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from clsa.bench import timing
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
