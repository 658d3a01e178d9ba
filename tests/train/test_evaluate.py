"""Evaluation against the specification, and the two commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from clsa import model, spec
from clsa.batch import SequenceChunk, build_batch
from clsa.checkpoint import open_checkpoint, save_checkpoint
from clsa.config import PAGE_SIZE, ModelConfig
from clsa.errors import RequestError, TrainError
from clsa.evaluate.held_out import cut_windows, evaluate
from clsa.ops import Memory, Selection
from clsa.params import nest
from clsa.plan import make_plan
from clsa.train.data import load_split
from clsa_cli.eval import eval_
from clsa_cli.train import train
from clsa_cuda.trainer import open_trainer
from tests.train.tiny import model_config, sharp_params, train_config, write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "clsa"
    config = model_config("clsa")
    save_checkpoint(folder, config, sharp_params(config), dtype="float32")
    return folder


class _Watching:
    """The specification's ops, which also note each selection and the queries and keys that read it."""

    def __init__(self) -> None:
        self.read: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(spec, name)

    def gather_attention(self, q: np.ndarray, memory: Memory, selection: Selection) -> np.ndarray:
        self.read.append((q, memory.k[: len(q)], selection.positions))
        return spec.gather_attention(q, memory, selection)


def spec_window(config: ModelConfig, tree: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Cross-entropy [T] and coverage [T] (None without an index) of one window [T + 1]."""
    ops, plan, pages = _Watching(), make_plan(config), range(-(-len(tokens) // PAGE_SIZE))
    chunk = SequenceChunk(tokens[:-1].tolist(), 0, pages, 0, "all")
    batch = build_batch(ops, [chunk], config.sliding_window)
    state = model.new_state(ops, plan, len(pages) * PAGE_SIZE, 1, "float32")
    logits, _ = model.forward(ops, tree, plan, batch, state)
    loss = -np.log(spec.softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]])
    if not ops.read:
        return loss, None
    teacher = spec.teacher(np.stack([q for q, _, _ in ops.read]), np.stack([k for _, k, _ in ops.read]))
    chosen = ops.read[0][2]
    return loss, np.array([teacher[t, row[row >= 0]].sum() for t, row in enumerate(chosen)])


def test_scores_are_those_of_the_specification(checkpoint: Path, data: Path) -> None:
    rows = evaluate([checkpoint], data=data, lengths=[20, 4], trainer=open_trainer("cpu", "float32"), batch_tokens=64)
    opened = open_checkpoint(checkpoint)
    tree = nest({name: spec.asarray(array) for name, array in opened.tensors()})
    assert [row["length"] for row in rows] == [20, 4]
    for row in rows:
        windows = cut_windows(*load_split(data, "held_out"), row["length"])
        assert (row["windows"], row["tokens"]) == (len(windows), len(windows) * row["length"])
        dense = [spec_window(replace(opened.config, index_topk_pattern="DD"), tree, w)[0] for w in windows]
        assert row["dense"]["loss"] == pytest.approx(np.mean(dense), abs=1e-5)
        sparse = [spec_window(opened.config, tree, w) for w in windows]
        assert row["sparse"]["loss"] == pytest.approx(np.mean([loss for loss, _ in sparse]), abs=1e-5)
        coverage = np.array([covered for _, covered in sparse])
        assert row["sparse"]["coverage"] == pytest.approx(coverage.mean(), abs=1e-5)
        if row["length"] == 20:  # k = 8
            assert row["sparse"]["coverage_from_k"] == pytest.approx(coverage[:, 8:].mean(), abs=1e-5)
            assert row["sparse"]["loss"] != pytest.approx(row["dense"]["loss"], abs=1e-3)
        else:
            assert row["sparse"]["coverage_from_k"] is None
            assert row["sparse"]["coverage"] == pytest.approx(1.0)


def test_a_dense_model_has_no_selection_to_report(data: Path, tmp_path: Path) -> None:
    config = model_config("yoco")
    save_checkpoint(tmp_path / "yoco", config, sharp_params(config), dtype="float32")
    row = evaluate([tmp_path / "yoco"], data=data, lengths=[20], trainer=open_trainer("cpu", "float32"))[0]
    assert "sparse" not in row and set(row["dense"]) == {"loss"}


def test_windows_stay_in_their_document_and_apart() -> None:
    tokens = np.arange(40, dtype=np.uint16)
    offsets = np.array([0, 9, 12, 40], np.int64)
    windows = cut_windows(tokens, offsets, 4)
    assert windows[:, 0].tolist() == [0, 4, 12, 16, 20, 24, 28, 32]
    assert (np.diff(windows, axis=1) == 1).all() and windows.shape == (8, 5)
    assert cut_windows(tokens, offsets, 4, limit=2)[:, 0].tolist() == [0, 32]
    assert cut_windows(tokens, offsets, 27)[:, 0].tolist() == [12]  # all of its document, the last as a target
    with pytest.raises(TrainError, match="the longest has 28"):
        cut_windows(tokens, offsets, 28)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([], RequestError, "at least one"),
        ([0], RequestError, "length must be between 1"),
        ([65], RequestError, "max_position_embeddings"),
        ([20, 10**12], RequestError, "length must be between"),
        ([100], TrainError, "the longest has 100"),
    ],
)
def test_bad_lengths_are_refused(
    lengths: list[int], error: type[Exception], message: str, checkpoint: Path, data: Path
) -> None:
    with pytest.raises(error, match=message):
        evaluate([checkpoint], data=data, lengths=lengths, trainer=open_trainer("cpu", "float32"))


def command(function: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(function)
    return app


def test_commands_train_and_evaluate(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "dense.json"
    recipe.write_text(json.dumps(train_config("dense", steps=3).to_dict()))
    paths = ["--data", str(data), "--backend", "cuda", "--device", "cpu", "--dtype", "float32"]
    runner = CliRunner()
    trained = runner.invoke(
        command(train), ["--recipe", str(recipe), "--out", str(tmp_path / "out"), *paths], catch_exceptions=False
    )
    assert trained.exit_code == 0
    assert json.loads(trained.stdout)["steps"] == 3
    assert "100% step 3" in trained.stderr and "tokens/s" in trained.stderr

    arguments = ["--model", str(tmp_path / "out"), "--lengths", "8,20", "--output", str(tmp_path / "eval.json"), *paths]
    scored = runner.invoke(command(eval_), arguments, catch_exceptions=False)
    assert scored.exit_code == 0
    result = json.loads(scored.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "eval.json").read_text())
    assert [row["length"] for row in result["rows"]] == [8, 20]
    for row in result["rows"]:
        assert f"{row['dense']['loss']:.4f}" in scored.stdout
