"""The training ops against the specification, and their gradients against finite differences."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clsa import model, spec
from clsa.batch import SequenceChunk, build_batch
from clsa.config import PAGE_SIZE, ModelConfig
from clsa.errors import BackendError
from clsa.ops import Ops, Queries, StepBatch
from clsa.params import nest
from clsa.plan import make_plan
from clsa.train.trainer import make_forward
from clsa_cuda.distill import Teacher
from clsa_cuda.train_ops import Routing, TrainOps, top_k_mask
from tests.train.tiny import PLANS, VOCAB, model_config, sharp_params

CPU = torch.device("cpu")


def spec_logits(config: ModelConfig, params: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """[B, T] -> [B * T, V], by the specification, sequence after sequence."""
    plan = make_plan(config)
    tree = nest({name: spec.asarray(w) for name, w in params.items()})
    out = []
    for row in tokens:
        pages = range(-(-len(row) // PAGE_SIZE))
        batch = build_batch(spec, [SequenceChunk(row.tolist(), 0, pages, 0, "all")], config.sliding_window)
        state = model.new_state(spec, plan, len(pages) * PAGE_SIZE, 1, "float32")
        logits, _ = model.forward(spec, tree, plan, batch, state)
        out.append(np.asarray(logits))
    return np.concatenate(out)


def step_batch(tokens: np.ndarray) -> StepBatch:
    batch, length = tokens.shape
    positions = torch.arange(length, dtype=torch.int32).repeat(batch)
    bounds = tuple(range(0, batch * length + 1, length))
    queries = Queries(positions, None, None, None, bounds, (length,) * batch)
    return StepBatch(torch.from_numpy(tokens.reshape(-1)), queries, None, None, None, None)


def run(
    config: ModelConfig, params: dict[str, Any], tokens: np.ndarray, sparse: bool, dtype: torch.dtype = torch.float32
) -> tuple[TrainOps, torch.Tensor]:
    ops = TrainOps(CPU, dtype, len(tokens), tokens.shape[1], sparse)
    weights = {n: w if isinstance(w, torch.Tensor) else torch.from_numpy(w).to(dtype) for n, w in params.items()}
    return ops, make_forward(config)(ops, weights, step_batch(tokens))


def random_tokens(batch: int, length: int) -> np.ndarray:
    """No token twice in a row of the batch: equal index keys would tie, up to rounding."""
    rng = np.random.default_rng(5)
    return np.stack([rng.permutation(VOCAB)[:length] for _ in range(batch)]).astype(np.int32)


@pytest.mark.parametrize("length", [4, 23])
@pytest.mark.parametrize("plan", PLANS)
def test_logits_are_those_of_the_specification(plan: str, length: int) -> None:
    config = model_config(plan)
    params, tokens = sharp_params(config), random_tokens(2, length)
    _, logits = run(config, params, tokens, sparse=True)
    np.testing.assert_allclose(logits.numpy(), spec_logits(config, params, tokens), atol=1e-4)


@pytest.mark.parametrize("plan", ["clsa", "dsa"])
def test_dense_is_the_same_weights_under_the_dense_pattern(plan: str) -> None:
    config = model_config(plan)
    dense = model_config(plan, index_topk_pattern="D" * len(config.index_topk_pattern))
    params, tokens = sharp_params(config), random_tokens(2, 23)
    ops, logits = run(config, params, tokens, sparse=False)
    np.testing.assert_allclose(logits.numpy(), spec_logits(dense, params, tokens), atol=1e-4)
    assert len(ops.routings) == config.index_topk_pattern.count("F")  # the index is computed all the same
    _, sparse = run(config, params, tokens, sparse=True)
    assert np.abs((logits - sparse).numpy()).max() > 1e-2


def test_blocks_of_tokens_are_selected_as_specified() -> None:
    config = model_config("clsa", index_block_size=4)
    params, tokens = sharp_params(config), random_tokens(2, 22)
    _, logits = run(config, params, tokens, sparse=True)
    np.testing.assert_allclose(logits.numpy(), spec_logits(config, params, tokens), atol=1e-4)


@pytest.mark.parametrize(("k", "block_size"), [(1, 1), (4, 1), (64, 1), (4, 2), (8, 4), (64, 8)])
def test_selection_is_exact_with_ties_infinities_and_nan(k: int, block_size: int) -> None:
    rng = np.random.default_rng(k)
    scores = rng.integers(-2, 3, (3, 19, 19)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.15] = np.nan
    scores[rng.random(scores.shape) < 0.1] = np.inf
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    mask = top_k_mask(torch.from_numpy(scores), k, block_size).numpy()
    for b in range(3):
        for t in range(19):
            wanted = spec.top_k(scores[b, t, : t + 1], k, block_size)
            np.testing.assert_array_equal(np.flatnonzero(mask[b, t]), wanted)


def routing(dtype: torch.dtype = torch.float64) -> tuple[Routing, dict[str, np.ndarray]]:
    """Two layers over two sequences of 11 tokens, k = 3."""
    rng = np.random.default_rng(1)
    arrays = {
        "q_idx": rng.standard_normal((2, 11, 4)),
        "k_idx": rng.standard_normal((2, 11, 4)),
        "q": 2 * rng.standard_normal((2, 2, 11, 6, 8)),  # [B, L, T, H, D]
        "k": rng.standard_normal((2, 2, 11, 3, 8)),
    }
    tensors = {name: torch.from_numpy(a).to(dtype) for name, a in arrays.items()}
    made = Routing(tensors["q_idx"], tensors["k_idx"], 3, 1)
    for layer in range(2):
        made.observe(tensors["q"][:, layer].transpose(1, 2), tensors["k"][:, layer].transpose(1, 2))
    return made, arrays


def test_distillation_loss_is_the_specified_one() -> None:
    made, a = routing()
    wanted = [spec.index_kd_loss(a["q_idx"][b], a["k_idx"][b], a["q"][b], a["k"][b]) for b in range(2)]
    assert float(made.kd_loss()) == pytest.approx(np.mean(wanted), rel=1e-9)
    assert np.mean(wanted) > 0.1


def test_coverage_is_the_teachers_mass_on_the_selected() -> None:
    made, a = routing(torch.float32)
    for b in range(2):
        teacher = spec.teacher(a["q"][b], a["k"][b])
        np.testing.assert_allclose(made.teacher.rows(0, 11)[b].numpy(), teacher, atol=1e-6)
        scores = a["q_idx"][b] @ a["k_idx"][b].T
        wanted = [teacher[t, spec.top_k(scores[t, : t + 1], 3, 1)].sum() for t in range(11)]
        np.testing.assert_allclose(made.coverage()[b].numpy(), wanted, atol=1e-6)


def test_distillation_gradient_is_that_of_finite_differences() -> None:
    rng = np.random.default_rng(2)
    shapes = ((2, 5, 3), (2, 5, 3), (2, 2, 5, 4), (2, 2, 5, 4))
    q_idx, k_idx, q, k = (torch.from_numpy(rng.standard_normal(s)).requires_grad_() for s in shapes)

    def loss(q_idx: torch.Tensor, k_idx: torch.Tensor) -> torch.Tensor:
        made = Routing(q_idx, k_idx, 2, 1)
        made.observe(q, k)
        return made.kd_loss()

    assert torch.autograd.gradcheck(loss, (q_idx, k_idx))
    loss(q_idx, k_idx).backward()
    assert q.grad is None and k.grad is None  # the teacher is not taught


@pytest.mark.parametrize("sparse", [True, False])
def test_model_gradient_is_that_of_finite_differences(sparse: bool) -> None:
    config = model_config("clsa")
    tokens, targets = random_tokens(2, 13), torch.from_numpy(random_tokens(2, 14)[:, 1:].reshape(-1)).long()
    params = {n: torch.from_numpy(w).double().requires_grad_() for n, w in sharp_params(config).items()}
    teacher: list[Teacher] = []

    def loss() -> torch.Tensor:
        ops, logits = run(config, params, tokens, sparse, torch.float64)
        assert logits.dtype == torch.float64
        made = ops.routings[0]
        if teacher:
            made.teacher = teacher[0]  # the loss holds it constant
        else:
            teacher.append(made.teacher)
        return F.cross_entropy(logits, targets) + 0.1 * ops.kd_loss()

    loss().backward()
    rng = np.random.default_rng(3)
    for name, weight in params.items():
        assert weight.grad is not None, name
        direction = torch.from_numpy(rng.standard_normal(weight.shape))
        base, values = weight.detach().clone(), []
        for sign in (1, -1):
            with torch.no_grad():
                weight.copy_(base + sign * 1e-6 * direction)
                values.append(float(loss()))
        with torch.no_grad():
            weight.copy_(base)
        wanted = (values[0] - values[1]) / 2e-6
        assert float((weight.grad * direction).sum()) == pytest.approx(wanted, rel=1e-4, abs=1e-7), name


def test_signatures_are_those_of_the_protocol() -> None:
    ops = TrainOps(CPU, torch.float32, 1, 4, True)
    for name, wanted in inspect.getmembers(Ops, inspect.isfunction):
        if not name.startswith("_"):
            parameters = list(inspect.signature(wanted).parameters)[1:]  # without self
            assert list(inspect.signature(getattr(ops, name)).parameters) == parameters, name


def test_what_belongs_to_serving_is_refused() -> None:
    ops = TrainOps(CPU, torch.float32, 1, 4, True)
    none: Any = None
    for call in (
        lambda: ops.take_selection(none, none),
        lambda: ops.copy_window(none, none, none),
        lambda: ops.sample(none, none),
        ops.memory_stats,
    ):
        with pytest.raises(BackendError, match="belongs to serving"):
            call()


def test_a_model_without_an_index_has_no_distillation() -> None:
    config = model_config("yoco")
    ops, _ = run(config, sharp_params(config), random_tokens(1, 9), sparse=True)
    assert float(ops.kd_loss()) == 0 and ops.coverage() is None
