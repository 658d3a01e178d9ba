"""`clsa info`: the numbers of a checkpoint without its weights, and what each backend would do here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clsa import BackendError, CheckpointError, backend, hub, spec
from clsa.backend import BackendInfo
from clsa.checkpoint import save_checkpoint
from clsa.ops import Device
from clsa.params import init_params, num_parameters
from tests.cli.conftest import Run
from tests.cli.fake import CONFIG

FOUND = [
    BackendInfo("mlx", (Device("gpu", "metal", False, "no Apple GPU"), Device("cpu", "cpu", True, "2 threads"))),
    BackendInfo("numpy", (Device("cpu", "cpu", True, "NumPy [float64]"),)),
    BackendInfo("toy", (), "ImportError: no toy"),
]


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> tuple[object, str]:
        if name == "toy":
            raise BackendError("backend 'toy' cannot run here: ImportError: no toy")
        return spec, f"mlx on cpu (asked for {name})"

    monkeypatch.setattr(backend, "backends", lambda: FOUND)
    monkeypatch.setattr(backend, "load_backend", load)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "[bold]model", CONFIG, init_params(CONFIG, 0))
    return tmp_path / "[bold]model"


@pytest.fixture
def no_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str) -> Path:
        raise CheckpointError(f"there is no model {name!r}")

    monkeypatch.setattr(hub, "resolve", resolve)


def test_sizes(run: Run, folder: Path) -> None:
    result = run("info", "--model", str(folder), "--json")
    assert (result.exit_code, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    model = json.loads(result.stdout)["model"]
    assert model.pop("config") == CONFIG.to_dict()
    assert model == {
        "name": str(folder),
        "folder": str(folder),
        "parameters": num_parameters(CONFIG),
        "weight_bytes": 4 * num_parameters(CONFIG),
        "dtype": "float32",
        "state_bytes_per_token": 4 * (2 * 2 * 8 + 8),
        "transformer_bytes_per_token": 4 * 4 * 2 * 2 * 8,
        "window_bytes_per_sequence": 4 * 2 * 16 * 2 * 2 * 8,
        "context": 512,
    }


def test_a_person_reads_the_same(run: Run, folder: Path) -> None:
    result = run("info", "--model", str(folder))
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    for part in (
        "[bold]model",
        f"parameters {num_parameters(CONFIG):,}",
        "4: 2 sliding_attention, 2 cross_attention",
        "FS; best 8 tokens",
        "160 bytes per token; a Transformer of these sizes keeps 512",
        "mlx gpu no no Apple GPU",
        "numpy cpu yes NumPy [float64]",
        "toy - no ImportError: no toy",
        "would run: mlx on cpu (asked for auto)",
        "of weights, 6.6 MB of state (float32), up to",
        "holds 16,384 tokens in 256 pages, 16,384 of them for prefixes; 32 sequences at a time, 2,048 tokens a step, "
        "128 snapshots",
    ):
        assert part in words


def test_the_memory_plan(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["info", "--model", str(folder), "--json", "--max-tokens-in-memory"]
    plan = json.loads(run(*command, "1000").stdout)["plan"]
    assert (plan["max_tokens_in_memory"], plan["pages"], plan["slots"], plan["refusal"]) == (1024, 16, 32, None)
    assert plan["state_bytes"] == 8 * ((32 + 128) * 2 * 16 * 2 * 2 * 8 + 1024 * (2 * 2 * 8 + 8))
    monkeypatch.setattr(spec, "memory_stats", lambda: {"free": 50_000_000})
    assert (
        "lower max_num_seqs or max_tokens_in_memory"
        in json.loads(run(*command, f"{1 << 32}").stdout)["plan"]["refusal"]
    )
    shown = " ".join(run("info", "--model", str(folder), "--max-tokens-in-memory", f"{1 << 32}").stdout.split())
    assert "memory the state needs" in shown


@pytest.mark.usefixtures("no_demo")
def test_without_a_demo_the_backends_are_still_listed(run: Run) -> None:
    result = run("info", "--json")
    assert (result.exit_code, result.stderr) == (0, "no model: there is no model 'demo'\n")
    facts = json.loads(result.stdout)
    assert facts["model"] is None
    assert [found["name"] for found in facts["backends"]] == ["mlx", "numpy", "toy"]
    assert facts["backends"][0]["devices"][0] == {
        "name": "gpu",
        "kind": "metal",
        "usable": False,
        "reason": "no Apple GPU",
    }
    assert (facts["choice"], facts["refusal"]) == ("mlx on cpu (asked for auto)", None)


@pytest.mark.usefixtures("no_demo")
def test_a_model_that_was_named_must_be_there(run: Run) -> None:
    result = run("info", "--model", "demo")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: there is no model 'demo'\n")


@pytest.mark.usefixtures("no_demo")
def test_one_backend(run: Run) -> None:
    facts = json.loads(run("info", "--json", "--backend", "toy").stdout)
    assert [found["name"] for found in facts["backends"]] == ["toy"]
    assert (facts["choice"], "cannot run here" in facts["refusal"]) == (None, True)
    result = run("info", "--backend", "frob")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: backend must be 'auto' or one of mlx, numpy, toy, got 'frob'" in result.stderr
