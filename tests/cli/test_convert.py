"""`clsa convert`: a model quantised, read again and run; what is refused, and that nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clsa import backend, hub, spec
from clsa.checkpoint import open_checkpoint
from tests.cli.conftest import Run
from tests.core.quantized import CONFIG, original
from tests.engine import models


@pytest.fixture(scope="module")
def model() -> str:
    return str(models.folder())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_runs(run: Run, model: str, tmp_path: Path, bits: int) -> None:
    out = tmp_path / "new" / "q"
    result = run(
        "convert", "--model", model, "--out", str(out), "--quantize", str(bits), "--group-size", "32", "--json"
    )
    assert result.exit_code == 0
    assert "quantising model.embed_tokens.weight" in result.stderr
    facts, made = json.loads(result.stdout), open_checkpoint(out)
    assert facts == {
        "folder": str(out),
        "parameters": facts["parameters"],
        "weight_bytes": made.num_bytes,
        "bits_per_parameter": round(8 * made.num_bytes / facts["parameters"], 3),
        "dtype": "float32",
        "quantization": {"group_size": 32, "bits": bits},
    }
    assert made.num_bytes < open_checkpoint(Path(model)).num_bytes / 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (Path(model) / name).read_bytes()
    answer = run(
        "generate", "--model", str(out), "--backend", "numpy", "--prompt", "def f", "--max-tokens", "3", "--json"
    )
    assert (answer.exit_code, json.loads(answer.stdout)["generation_tokens"] > 0) == (0, True)


def test_a_person_reads_bytes_and_bits(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "backends", list)
    monkeypatch.setattr(backend, "load_backend", lambda name: (spec, "nothing"))
    out = tmp_path / "q"
    made = run("convert", "--model", str(original()), "--out", str(out), "--quantize", "4")
    assert made.exit_code == 0
    shown = run("info", "--model", str(out))
    assert shown.exit_code == 0
    size, parameters = open_checkpoint(out).num_bytes, json.loads(run("info", "--model", str(out), "--json").stdout)
    facts = parameters["model"]
    assert (facts["weight_bytes"], facts["config"]["quantization"]) == (size, {"group_size": 64, "bits": 4})
    line = (
        f"weights {size / 1000:.1f} kB, 4 bits in groups of 64, the rest bfloat16; "
        f"{8 * size / facts['parameters']:.2f} bits per parameter"
    )
    for result in (made, shown):
        assert line in " ".join(result.stdout.split())


def test_dtype_alone(run: Run, tmp_path: Path) -> None:
    result = run("convert", "--model", str(original()), "--out", str(tmp_path / "m"), "--dtype", "float32", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["quantization"] is None
    assert open_checkpoint(tmp_path / "m").config.torch_dtype == "float32" != CONFIG.torch_dtype


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--quantize", "3"], "Invalid value for '--quantize': must be 4 or 8, got 3"),
        (["--quantize", "4", "--group-size", "17"], "'--group-size': must be 32, 64 or 128, got 17"),
        (["--group-size", "64"], "--group-size belongs to --quantize 4 or --quantize 8"),
        (["--dtype", "int8"], "'--dtype': must be one of float32, bfloat16, float16, got 'int8'"),
        (["--backend", "mlx"], "'--backend': a conversion runs on the host, with auto or numpy, got 'mlx'"),
    ],
)
def test_bad_usage(run: Run, tmp_path: Path, args: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "resolve", None)
    result = run("convert", "--model", "demo", "--out", str(tmp_path / "out"), *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr and result.stderr.count("\n") == 1


def test_nothing_is_overwritten(run: Run, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", "--model", str(original()), "--out", str(out), "--quantize", "8").exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for source, target in ((model, out), (str(out), out), (str(out), tmp_path / "again")):
        result = run("convert", "--model", source, "--out", str(target), "--quantize", "4", "--group-size", "32")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not (tmp_path / "again").exists()
