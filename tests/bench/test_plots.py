"""Pictures of results: what is drawn is what the result says, and what cannot be drawn is refused in a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clsa.bench import plots, timing
from clsa.bench.sizes import PLANS
from clsa_cli.main import app
from scripts import figures

TINY = ("--sizes", "tiny", "--backend", "numpy", "--seconds", "0.001", "--tokens-per-step", "64", "--no-peers")
PLACES = ("--plans", "transformer,clsa", "--contexts", "100", "--batches", "2")
SERVE = ("--requests", "3", "--input-tokens", "9", "--output-tokens", "3", "--max-num-seqs", "2")


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.bench.bench.measure_ceilings", lambda *_: timing.Ceilings(1e10, "a test", 1e10))


def words(picture: Path) -> list[str]:
    """The texts of an SVG, in order."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text(encoding="utf-8"))


def result(name: str, rows: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    return {"benchmark": name, "machine": {"device": "a $5 device"}, "sizes": "tiny", "rows": rows, **facts}


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (("ops",), ["select", "FLOP per second", "0.01 TB/s"]),
        (("decode", *PLACES), ["Transformer", "CLSA", "1.0x", "batch 2", "tokens of context"]),
        (("prefill", *PLACES, "--short", "50"), ["1 x 100", "2 x 50", "prompt tokens per second"]),
        (("serve", *PLACES, *SERVE), ["p99", "time to first token", "ms"]),
        (("paper", *PLACES), ["MLP", "attention", "routing", "decode, batch 2", "CLSA"]),
        (("capacity", *PLACES, "--max-batch", "2"), ["(2)", "CLSA"]),
    ],
)
def test_every_command_draws(command: tuple[str, ...], shown: list[str], tmp_path: Path) -> None:
    picture, file = tmp_path / "pictures" / "it.svg", tmp_path / "it.json"
    options = (*command[1:], *TINY, "--plot", str(picture), "--output", str(file))
    places = () if command[1:] else ("--contexts", "100", "--batches", "1,2")
    done = CliRunner().invoke(app, ["bench", command[0], *options, *places])
    assert done.exit_code == 0, done.stderr
    drawn = words(picture)
    assert all(any(text in word for word in drawn) for text in shown), drawn
    again = tmp_path / "again.svg"
    done = CliRunner().invoke(app, ["bench", "plot", str(file), "--plot", str(again)])
    assert done.exit_code == 0, done.stderr
    assert again.read_bytes() == picture.read_bytes()


def test_ratios_are_to_the_first_plan(tmp_path: Path) -> None:
    rates = {"transformer": (100.0, 40.0), "clsa": (250.0, None)}
    rows = [
        {"plan": plan, "context": context, "batch": 8, "tokens_per_second": rate}
        for plan, both in rates.items()
        for context, rate in zip((8192, 131072), both, strict=True)
    ]
    plots.draw(result("decode", rows), tmp_path / "it.svg")
    drawn = words(tmp_path / "it.svg")
    assert [word for word in drawn if re.fullmatch(r"[\d.]+x|none", word)] == ["1.0x", "1.0x", "2.5x", "none"]
    assert {"8K", "128K", "batch 8"} <= set(drawn) and any("a $5 device" in word for word in drawn)


def test_stacked_latency_is_the_sum(tmp_path: Path) -> None:
    parts = {"layer_mlp_seconds": 1e-4, "layer_attention_seconds": 2e-3, "layer_routing_seconds": 0}
    rates = {f"{name}_tokens_per_second": 1.0 for name in ("prefill", "decode", "end_to_end")}
    plots.draw(result("paper", [{"plan": "clsa", "context": 64, "batch": 1, **parts, **rates}]), tmp_path / "it.svg")
    assert "2.1" in words(tmp_path / "it.svg")


ROW: dict[str, Any] = {"plan": "clsa", "context": 64, "batch": 1, "tokens_per_second": 1.0}
BAD: dict[str, tuple[Any, str]] = {
    "not json": ("{", "is not a JSON file"),
    "deep": ("[" * 100_000, "is not a JSON file"),
    "a list": ([], "must be the result of clsa bench"),
    "another program's": ({"benchmark": "scheduler", "rows": []}, "must be the result of clsa bench"),
    "no rows": (result("decode", []), "must be a list of 1 to"),
    "rows of numbers": (result("decode", [1]), "must be a list of 1 to"),  # type: ignore[list-item]
    "no plan": (result("decode", [ROW | {"plan": None}]), "plan must be str in every row"),
    "a list for a plan": (result("decode", [ROW | {"plan": []}]), "plan must be str in every row"),
    "text for a batch": (result("decode", [ROW | {"batch": "1"}]), "batch must be int in every row"),
    "text for a rate": (result("decode", [ROW | {"tokens_per_second": "fast"}]), "tokens_per_second in the result"),
    "infinite": (result("decode", [ROW | {"tokens_per_second": float("inf")}]), "tokens_per_second in the result"),
    "serve without plans": (result("serve", [{}]), "plan must be str"),
    "no shape": (result("prefill", [ROW]), "prompts must be int"),
    "no ceilings": (result("ops", [{"op": "select", "batch": 1}]), "a roofline needs ceilings"),
    "op of a list": (result("ops", [{"op": [], "batch": 1}], ceilings=3), "op must be str"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_result_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, sentence = BAD[name]
    file, picture = tmp_path / "it.json", tmp_path / "it.svg"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    done = CliRunner().invoke(app, ["bench", "plot", str(file), "--plot", str(picture)])
    assert done.exit_code == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert not picture.exists()


@pytest.mark.parametrize("command", [("decode", *TINY), ("plot", "it.json")])
def test_what_cannot_be_drawn_is_said_before_anything_runs(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("clsa.bench.bench.load_backend", lambda *_: pytest.fail("it ran"))
    done = CliRunner().invoke(app, ["bench", *command, "--plot", str(tmp_path / "it.gif")])
    assert done.exit_code == 2 and "--plot must end in .svg, .png, .pdf, got 'it.gif'" in done.stderr
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda _: None)
    done = CliRunner().invoke(app, ["bench", *command, "--plot", str(tmp_path / "it.svg")])
    assert done.exit_code == 1 and 'pip install "clsa[bench]"' in done.stderr


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "it.json").write_text(json.dumps(result("decode", [ROW])))
    picture = str(tmp_path / "file" / "it.svg")
    done = CliRunner().invoke(app, ["bench", "plot", str(tmp_path / "it.json"), "--plot", picture])
    assert done.exit_code == 1 and "cannot be written" in done.stderr


def test_pictures_of_the_documents_are_those_of_their_results(tmp_path: Path) -> None:
    """Their words are: where a line runs may change with matplotlib."""
    names = figures.draw_all(tmp_path)
    assert "decode-mlx-cpu.svg" in names
    docs = Path(__file__).resolve().parents[2] / "docs"
    for name in names:
        assert words(docs / name) == words(tmp_path / name), f"{name} is old: python scripts/figures.py"
    assert not [name for name in figures.PICTURES if name not in names and (docs / name).exists()]


def test_plans_have_names_and_colours() -> None:
    from clsa.bench.plot_parts import colours

    found = list(colours([*PLANS, "transformers 5.17.0 dense", "x" * 60]))
    assert len({label for _, label, _ in found}) == len({colour for *_, colour in found}) == len(PLANS) + 2
    assert max(len(label) for _, label, _ in found) <= 40
