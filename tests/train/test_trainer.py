"""The torch trainer: what moves and how far, micro-batches, precision, the optimiser's state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clsa.config import ModelConfig
from clsa.errors import BackendError, TrainError
from clsa.train.stages import trainable
from clsa.train.trainer import make_forward
from clsa_cuda.train_ops import TrainOps
from clsa_cuda.trainer import TorchTrainer, open_trainer
from tests.train.tiny import VOCAB, model_config, sharp_params, train_config

CLSA = model_config("clsa")
RULE: dict[str, Any] = {
    "lr": 0.01,
    "clip": 1.0,
    "lm_weight": 1.0,
    "kd_weight": 0.1,
    "sparse": True,
    "with_coverage": True,
}


def batch(sequences: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rows = np.random.default_rng(seed).integers(0, VOCAB, (sequences, 17), dtype=np.int32)
    return rows[:, :-1], rows[:, 1:]


def prepared(config: ModelConfig = CLSA, stage: str = "joint", dtype: str = "float32", **changes: Any) -> TorchTrainer:
    trainer = open_trainer("cpu", dtype)
    trainer.load(sharp_params(config))
    trainer.prepare(trainable(train_config(stage, **changes), config), (0.9, 0.95), 1e-8)
    return trainer


def test_an_update_is_adamw_on_the_clipped_gradient() -> None:
    before = sharp_params(CLSA)
    inputs, targets = batch()
    weights = {n: torch.from_numpy(w).requires_grad_() for n, w in before.items()}
    trainer = prepared()
    ops = TrainOps(torch.device("cpu"), torch.float32, 4, 16, True)
    logits = make_forward(CLSA)(ops, weights, trainer._batch(torch.from_numpy(inputs.copy()).view(-1), 4, 16))
    loss = F.cross_entropy(logits, torch.from_numpy(targets.copy()).view(-1).long()) + 0.1 * ops.kd_loss()
    loss.backward()
    gradients = {n: w.grad.numpy().astype(np.float64) for n, w in weights.items() if w.grad is not None}
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert norm > 1.0  # so that clipping shows

    metrics = trainer.step(make_forward(CLSA), [(inputs, targets)], **RULE)()

    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["loss"] == pytest.approx(metrics["lm_loss"] + 0.1 * metrics["kd_loss"], rel=1e-6)
    after, moments = trainer.params(), trainer.moments()
    for name, old in before.items():
        gradient = gradients[name] / norm
        decay = 0.1 if old.ndim > 1 and name != "model.embed_tokens.weight" else 0.0
        wanted = old * (1 - 0.01 * decay) - 0.01 * gradient / (np.abs(gradient) + 1e-8)
        clear = np.abs(gradient) > 1e-6  # below, the sign hangs on rounding
        np.testing.assert_allclose(after[name][clear], wanted[clear], atol=2e-5, err_msg=name)
        np.testing.assert_allclose(moments[f"exp_avg.{name}"], 0.1 * gradient, atol=1e-6)


def test_micro_batches_make_the_gradient_of_the_whole() -> None:
    inputs, targets = batch(4)
    whole, parts = prepared(), prepared()
    one = whole.step(make_forward(CLSA), [(inputs, targets)], **RULE)()
    halves = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    two = parts.step(make_forward(CLSA), halves, **RULE)()
    assert two == pytest.approx(one, rel=1e-5)
    for name, moment in whole.moments().items():
        np.testing.assert_allclose(parts.moments()[name], moment, atol=1e-7, err_msg=name)


def test_indexer_stage_touches_the_index_alone() -> None:
    trainer = prepared(stage="indexer")
    before = trainer.params()
    rule = RULE | {"lm_weight": 0.0, "kd_weight": 1.0, "sparse": False}
    metrics = trainer.step(make_forward(CLSA), [batch()], **rule)()
    assert metrics["loss"] == metrics["kd_loss"] > 0
    changed = {name for name, value in trainer.params().items() if not np.array_equal(value, before[name])}
    assert changed == {"model.layers.2.indexer.q_proj.weight", "model.memory.index_k_proj.weight"}
    assert {name for name, weight in trainer._params.items() if weight.requires_grad} == changed  # no work for others


def test_distillation_alone_reaches_the_backbone_through_the_index() -> None:
    trainer = prepared()
    before = trainer.params()
    trainer.step(make_forward(CLSA), [batch()], **(RULE | {"lm_weight": 0.0}))()
    changed = {name for name, value in trainer.params().items() if not np.array_equal(value, before[name])}
    assert "model.layers.0.mlp.up_proj.weight" in changed  # H is not detached: the paper stops the teacher only
    moments = trainer.moments()
    assert not moments["exp_avg.model.layers.3.self_attn.q_proj.weight"].any()  # the teacher learns nothing


def test_bfloat16_computes_close_and_keeps_float32_weights() -> None:
    exact = prepared().score(make_forward(CLSA), *batch(), sparse=False)[0]
    trainer = prepared(dtype="bfloat16")
    rough = trainer.score(make_forward(CLSA), *batch(), sparse=False)[0]
    assert 0 < np.abs(rough - exact).mean() < 0.05
    trainer.step(make_forward(CLSA), [batch()], **(RULE | {"lr": 1e-5}))()
    embedding = trainer.params()["model.embed_tokens.weight"]
    assert not np.array_equal(embedding, sharp_params(CLSA)["model.embed_tokens.weight"])  # too small for bfloat16
    assert embedding.dtype == np.float32


def test_restored_moments_go_on_bit_for_bit() -> None:
    trainer, forward = prepared(), make_forward(CLSA)
    for i in range(2):
        trainer.step(forward, [batch(seed=i)], **RULE)()
    again = open_trainer("cpu", "float32")
    again.load(trainer.params())
    again.prepare(trainable(train_config("joint"), CLSA), (0.9, 0.95), 1e-8)
    again.restore(trainer.moments(), 2)
    first, second = (t.step(forward, [batch(seed=9)], **RULE)() for t in (trainer, again))
    assert first == second
    for name, value in trainer.params().items():
        np.testing.assert_array_equal(again.params()[name], value)


def test_moments_of_another_model_are_refused() -> None:
    trainer = prepared()
    with pytest.raises(TrainError, match="does not fit"):
        trainer.restore({}, 1)


def test_scores_are_of_each_token_and_without_gradient() -> None:
    trainer = prepared()
    inputs, targets = batch()
    loss, coverage = trainer.score(make_forward(CLSA), inputs, targets, sparse=True)
    assert loss.shape == (4, 16) and coverage is not None and coverage.shape == (4, 16)
    np.testing.assert_allclose(coverage[:, :8], 1.0, atol=1e-6)  # up to k = 8 tokens are seen: all are selected
    assert coverage[:, 8:].max() < 1.0
    metrics = trainer.step(make_forward(CLSA), [(inputs, targets)], **RULE)()
    assert metrics["lm_loss"] == pytest.approx(float(loss.mean()), rel=1e-6)
    assert metrics["coverage"] == pytest.approx(float(coverage.mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", "float16", "float32 or bfloat16"),
        ("metal", "float32", "'cuda', 'cuda:N' or 'cpu'"),
        ("cuda:99", "float32", "there is no device"),
    ],
)
def test_what_cannot_train_is_refused(device: str, dtype: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        open_trainer(device, dtype)


@pytest.mark.cuda
def test_gpu_computes_what_the_cpu_does() -> None:
    forward = make_forward(CLSA)
    there = open_trainer("cuda", "float32")
    there.load(sharp_params(CLSA))
    there.prepare(trainable(train_config("joint"), CLSA), (0.9, 0.95), 1e-8)
    got = there.step(forward, [batch()], **RULE)()
    assert got == pytest.approx(prepared().step(forward, [batch()], **RULE)(), rel=1e-4)
