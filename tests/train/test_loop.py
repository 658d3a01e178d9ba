"""Whole stages on a CPU: what they leave behind, resuming, stopping, and what they refuse to start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clsa.checkpoint import open_checkpoint
from clsa.errors import ClsaError, ConfigError, TrainError
from clsa.train.config import TrainConfig, read_train_config
from clsa.train.loop import METRICS_FILE, Result, run
from clsa.train.recipes import read_recipe, run_recipe
from clsa.train.schedule import learning_rate
from clsa.train.snapshot import read_snapshot
from clsa_cuda.trainer import TorchTrainer, open_trainer
from tests.train.tiny import model_dict, train_config, write_corpus

STEPS = {"dense": 40, "indexer": 30, "joint": 20}
RATES = {"dense": 1e-2, "indexer": 2e-2, "joint": 2e-3}


def trainer() -> TorchTrainer:
    return open_trainer("cpu", "float32")


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in open_checkpoint(folder).tensors()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="module")
def stages(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three stages, each from the one before."""
    root = tmp_path_factory.mktemp("runs")
    start = None
    for stage in ("dense", "indexer", "joint"):
        config = train_config(stage, steps=STEPS[stage], learning_rate=RATES[stage])
        run(config, data=data, out=root / stage, trainer=trainer(), start=start)
        start = root / stage
    return {stage: root / stage for stage in STEPS}


@pytest.mark.parametrize("stage", STEPS)
def test_loss_falls(stage: str, stages: dict[str, Path]) -> None:
    losses = [entry["loss"] for entry in metrics(stages[stage])]
    share = {"dense": 0.8, "indexer": 0.8, "joint": 0.95}[stage]
    assert len(losses) == STEPS[stage]
    assert np.mean(losses[-3:]) < share * np.mean(losses[:3])


def test_a_stage_leaves_a_checkpoint_with_its_tokenizer(stages: dict[str, Path]) -> None:
    patterns = {stage: open_checkpoint(out).config.index_topk_pattern for stage, out in stages.items()}
    assert patterns == {"dense": "DD", "indexer": "FS", "joint": "FS"}
    assert all((out / "tokenizer.json").read_text() == "{}" for out in stages.values())


def test_indexer_leaves_the_backbone_bit_for_bit(stages: dict[str, Path]) -> None:
    before, after = tensors(stages["dense"]), tensors(stages["indexer"])
    assert set(after) - set(before) == {"model.layers.2.indexer.q_proj.weight", "model.memory.index_k_proj.weight"}
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name


def test_joint_trains_everything(stages: dict[str, Path]) -> None:
    before, after = tensors(stages["indexer"]), tensors(stages["joint"])
    assert [name for name in before if np.array_equal(before[name], after[name])] == []


def test_metrics_say_what_each_stage_minimises(stages: dict[str, Path]) -> None:
    for stage, names in (("dense", set()), ("indexer", {"kd_loss", "coverage"}), ("joint", {"kd_loss", "coverage"})):
        for entry in metrics(stages[stage]):
            common = {"step", "loss", "lm_loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
            assert set(entry) == common | names
            kd, lm = entry.get("kd_loss", 0.0), entry["lm_loss"]
            wanted = {"dense": lm, "indexer": kd, "joint": lm + 0.1 * kd}[stage]
            assert entry["loss"] == pytest.approx(wanted, rel=1e-6)


class _Stops(TorchTrainer):
    """Breaks in the middle of update `last + 1`; or reports or does what it should not."""

    def __init__(self, last: int = 10**9, poison: float | None = None, thaw: str | None = None) -> None:
        inner = trainer()
        super().__init__(inner._device, inner._dtype)
        self._last, self._poison, self._thaw, self._made = last, poison, thaw, 0

    def step(self, *args: Any, **rule: Any) -> Callable[[], dict[str, float]]:
        read = super().step(*args, **rule)
        self._made += 1
        if self._made > self._last:
            if (poison := self._poison) is None:
                raise KeyboardInterrupt
            return lambda: read() | {"loss": poison}
        return read

    def params(self) -> dict[str, np.ndarray]:
        values = super().params()
        if self._thaw is not None:
            values[self._thaw].view(np.uint32).flat[0] ^= 1
        return values


@pytest.mark.parametrize("stage", ["dense", "joint"])
def test_resumed_run_is_the_uninterrupted_one(stage: str, data: Path, stages: dict[str, Path], tmp_path: Path) -> None:
    config = train_config(stage, steps=7, save_every=3, decay="cosine", warmup_steps=2, batch_size=2, seed=4)
    start = stages["indexer"] if stage == "joint" else None
    run(config, data=data, out=tmp_path / "whole", trainer=trainer(), start=start)
    with pytest.raises(KeyboardInterrupt):
        run(config, data=data, out=tmp_path / "cut", trainer=_Stops(last=5), start=start)
    assert read_snapshot(tmp_path / "cut").step == 3
    assert len(metrics(tmp_path / "cut")) == 4  # of which one is made again

    result = run(config, data=data, out=tmp_path / "cut", trainer=trainer(), resume=True)

    assert (result.steps, result.tokens) == (7, 7 * 192)
    keys = ("step", "loss", "lm_loss", "lr", "grad_norm")
    whole, cut = ([[entry[key] for key in keys] for entry in metrics(tmp_path / p)] for p in ("whole", "cut"))
    assert cut == whole
    whole_weights, cut_weights = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(value.tobytes() == cut_weights[name].tobytes() for name, value in whole_weights.items())


def test_a_run_cut_before_its_first_snapshot_resumes_from_the_start(data: Path, tmp_path: Path) -> None:
    config = train_config("dense", steps=3)
    with pytest.raises(KeyboardInterrupt):
        run(config, data=data, out=tmp_path / "a", trainer=_Stops(last=1))
    resumed = run(config, data=data, out=tmp_path / "a", trainer=trainer(), resume=True)
    assert resumed.last["loss"] == run(config, data=data, out=tmp_path / "b", trainer=trainer()).last["loss"]


def test_resuming_a_finished_run_changes_nothing(stages: dict[str, Path], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    shutil.copytree(stages["dense"], out)
    config = train_config("dense", steps=STEPS["dense"], learning_rate=RATES["dense"])
    assert run(config, data=data, out=out, trainer=trainer(), resume=True).steps == STEPS["dense"]
    assert (out / "model.safetensors").read_bytes() == (stages["dense"] / "model.safetensors").read_bytes()
    assert metrics(out) == metrics(stages["dense"])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_snapshot(poison: float, data: Path, tmp_path: Path) -> None:
    config = train_config("dense", steps=9, save_every=2)
    with pytest.raises(TrainError, match=r"loss is not finite in step 4; the snapshot of step 2 is kept"):
        run(config, data=data, out=tmp_path / "out", trainer=_Stops(last=3, poison=poison))
    snapshot = read_snapshot(tmp_path / "out")
    assert snapshot.step == 2
    assert all(np.isfinite(value).all() for value in snapshot.params.values())
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_frozen_weight_that_changed_fails_loudly(data: Path, stages: dict[str, Path], tmp_path: Path) -> None:
    config = train_config("indexer", steps=1)
    thawed = _Stops(thaw="model.layers.0.mlp.up_proj.weight")
    with pytest.raises(TrainError, match=r"1 frozen tensors changed .*'model.layers.0.mlp.up_proj.weight'"):
        run(config, data=data, out=tmp_path / "out", trainer=thawed, start=stages["dense"])
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_bounded_run_ends_in_time_with_its_decay_complete(data: Path, tmp_path: Path) -> None:
    config = train_config("dense", steps=10**6, decay="linear")
    result = run(config, data=data, out=tmp_path / "out", trainer=trainer(), max_minutes=0.01)
    rates = [entry["lr"] for entry in metrics(tmp_path / "out")]
    assert 1 < result.steps < 10**6
    assert rates[0] > 0.5 * config.learning_rate > rates[-1] and rates == sorted(rates, reverse=True)


def test_learning_rate_rises_by_steps_and_falls_by_progress() -> None:
    assert [learning_rate(s, 0.0, 2.0, 4, "constant") for s in (0, 1, 3, 9)] == [0.5, 1.0, 2.0, 2.0]
    assert [learning_rate(9, p, 2.0, 4, "linear") for p in (0.0, 0.5, 1.0)] == [2.0, 1.0, 0.0]
    assert [round(learning_rate(9, p, 2.0, 4, "cosine"), 9) for p in (0.0, 0.5, 1.0)] == [2.0, 1.0, 0.0]
    assert learning_rate(0, 0.0, 2.0, 0, "constant") == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "distil"}, "stage must be one of"),
        ({"decay": "step"}, "decay must be one of"),
        ({"save_dtype": "float16"}, "save_dtype must be one of"),
        ({"lr": 1.0}, "unknown training config keys: lr"),
        ({"steps": 0}, "steps must be between 1"),
        ({"steps": True}, "steps must be an integer"),
        ({"seq_len": 10**9}, "seq_len must be between"),
        ({"batch_size": -1}, "batch_size must be between"),
        ({"tokens_per_step": 100}, "multiple of batch_size"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a finite number"),
        ({"warmup_steps": 13}, "warmup_steps must be between 0 and 12"),
        ({"beta1": 1.0}, "beta1 must be between"),
        ({"grad_clip": 0.0}, "grad_clip must be between"),
        ({"stage": "joint", "model": model_dict()}, "takes no model"),
        ({"model": model_dict() | {"vocab_size": 0}}, "vocab_size must be between"),
    ],
)
def test_a_bad_recipe_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_config(**({"stage": "dense"} | changes))


def test_a_recipe_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ('{"stage": "dense"}', '{"stage": "dense", "stage": "joint"}', "[]", "{"):
        path.write_text(text)
        with pytest.raises(ClsaError, match=r"a\.json"):
            read_train_config(path)


@pytest.mark.parametrize(
    ("config", "start", "message"),
    [
        (train_config("dense", model=None), None, "needs a checkpoint to start from"),
        (train_config("dense"), "dense", "leave .* or the model out"),
        (train_config("indexer"), None, "needs a checkpoint to start from"),
        (train_config("indexer"), "joint", "starts from a dense model"),
        (train_config("joint"), "dense", "trains a model with an index"),
        (train_config("dense", model=None), "joint", "trains a model without an index"),
        (train_config("joint", seq_len=96, tokens_per_step=384), "joint", "max_position_embeddings"),
        (train_config("dense", model=model_dict() | {"vocab_size": 20}), None, "beyond the model's vocab_size 20"),
        (train_config("dense", batch_size=256, tokens_per_step=24 * 256), None, "needs 6168 tokens"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_training(
    config: TrainConfig, start: str | None, message: str, data: Path, stages: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=message):
        run(config, data=data, out=tmp_path / "out", trainer=trainer(), start=stages[start] if start else None)
    assert not (tmp_path / "out" / METRICS_FILE).exists()


def test_a_folder_in_use_and_a_changed_recipe_are_refused(data: Path, stages: dict[str, Path], tmp_path: Path) -> None:
    config = train_config("dense", steps=STEPS["dense"], learning_rate=1.0)
    with pytest.raises(TrainError, match="is not empty"):
        run(config, data=data, out=stages["dense"], trainer=trainer())
    with pytest.raises(TrainError, match="started with another learning_rate"):
        run(config, data=data, out=stages["dense"], trainer=trainer(), resume=True)
    with pytest.raises(TrainError, match="has no run to resume"):
        run(config, data=data, out=tmp_path / "none", trainer=trainer(), resume=True)


def test_a_damaged_snapshot_is_refused(stages: dict[str, Path], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    shutil.copytree(stages["dense"], out)
    params = next((out / "resume").glob("step-*/params.safetensors"))
    params.write_bytes(params.read_bytes()[:1000])
    config = train_config("dense", steps=STEPS["dense"], learning_rate=RATES["dense"])
    with pytest.raises(TrainError, match="is damaged"):
        run(config, data=data, out=out, trainer=trainer(), resume=True)


def test_a_folder_of_stages_runs_in_order_and_resumes(data: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe", tmp_path / "out"
    recipe.mkdir()
    for name, stage in (("2-indexer", "indexer"), ("1-dense", "dense"), ("3-joint", "joint")):
        (recipe / f"{name}.json").write_text(json.dumps(train_config(stage, steps=2).to_dict()))
    stages = read_recipe(recipe)
    assert [name for name, _ in stages] == ["1-dense", "2-indexer", "3-joint"]

    def go(resume: bool) -> list[tuple[str, Result]]:
        return run_recipe(stages, data=data, out=out, trainer=trainer(), resume=resume)

    assert [name for name, _ in go(resume=False)] == ["1-dense", "2-indexer", "3-joint"]
    last = tensors(out / "3-joint")
    shutil.rmtree(out / "3-joint")
    assert [name for name, _ in go(resume=True)] == ["3-joint"]
    assert all(np.array_equal(value, last[name]) for name, value in tensors(out / "3-joint").items())


def test_the_demo_recipe_fits_the_package() -> None:
    from clsa.config import ModelConfig
    from clsa.params import num_bytes
    from clsa.train.stages import with_index

    stages = read_recipe(Path(__file__).resolve().parents[2] / "recipes" / "demo")
    assert [config.stage for _, config in stages] == ["dense", "dense", "indexer", "joint"]
    assert stages[0][1].model is not None
    model = with_index(ModelConfig.from_dict(stages[0][1].model))
    assert num_bytes(model, stages[-1][1].save_dtype) <= 12_000_000
    assert (model.sliding_window, model.index_topk) == (128, 256) and model.max_position_embeddings >= 4096
