"""What is kept in 8 bits: three switches that mean the same to every command that loads a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clsa import EngineConfig, spec
from clsa.checkpoint import save_checkpoint
from clsa.params import init_params
from tests.cli.conftest import Run
from tests.cli.fake import CONFIG, FakeLLM

SWITCHES = ["--kv-dtype", "--index-dtype", "--weight-dtype"]


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"]])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_becomes_a_field_of_the_engine(run: Run, fake: FakeLLM, command: list[str], switch: str) -> None:
    assert run(*command, switch, "fp8", stdin="hello\n").exit_code == 0
    engine: EngineConfig = fake.loaded_with[-1]["engine"]
    got = {f"--{name}-dtype": getattr(engine, f"{name}_dtype") for name in ("kv", "index", "weight")}
    assert got == dict.fromkeys(SWITCHES) | {switch: "fp8"}


def test_a_batch_takes_them_too(run: Run, fake: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"custom_id": "a", "body": {"prompt": "x"}}\n')
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert run("generate", *files, "--kv-dtype", "fp8").exit_code == 0
    assert fake.loaded_with[-1]["engine"] == EngineConfig(kv_dtype="fp8")


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"], ["info"]])
@pytest.mark.parametrize("switch", SWITCHES)
def test_there_is_one_choice(run: Run, fake: FakeLLM, command: list[str], switch: str) -> None:
    result = run(*command, switch, "int8")
    assert (result.exit_code, fake.loaded_with) == (2, ())
    assert "must be fp8" in " ".join(result.stderr.split())


def test_info_counts_the_bytes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "model", CONFIG, init_params(CONFIG, 0))
    command = ["info", "--model", str(tmp_path / "model"), "--backend", "numpy", "--json"]
    plain = json.loads(run(*command).stdout)
    facts = json.loads(run(*command, "--kv-dtype", "fp8", "--index-dtype", "fp8", "--weight-dtype", "fp8").stdout)
    assert plain["model"]["state_bytes_per_token"] == 4 * (2 * 2 * 8 + 8)
    assert facts["model"]["state_bytes_per_token"] == 2 * 2 * 8 + 8
    assert plain["plan"]["state_bytes"] - facts["plan"]["state_bytes"] == 7 * 16384 * (2 * 2 * 8 + 8)
    assert facts["plan"]["weight_bytes"] < plain["plan"]["weight_bytes"]
    monkeypatch.setattr(spec, "no_fp8", {"weights": "not on this machine"})
    assert json.loads(run(*command, "--weight-dtype", "fp8").stdout)["plan"] == {"refusal": "not on this machine"}


def test_generate_with_a_real_model(run: Run, tmp_path: Path) -> None:
    from tests.engine import models

    command = ["generate", "--model", str(models.save(tmp_path / "model")), "--backend", "numpy", "--prompt", "for"]
    result = run(*command, "--max-tokens", "4", "--kv-dtype", "fp8", "--weight-dtype", "fp8", "--json", "--report")
    answer = json.loads(result.stdout)
    assert (answer["kv_dtype"], answer["index_dtype"], answer["weight_dtype"]) == ("fp8", None, "fp8")
    assert f"{2 * 2 * 8 + 4 * 16} bytes per token" in " ".join(result.stderr.split())
