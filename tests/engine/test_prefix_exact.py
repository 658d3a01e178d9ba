"""After a prefix hit the logits are, bit for bit, those of computing the prompt again.

That holds for the same chunks wherever a computation repeats itself. A hit may cut the prompt elsewhere than computing
it again does; then it still holds where a row of a product does not depend on how many rows are computed with it. NumPy
is like that, and MLX on CPU but for chunks of one token, which are cut off in both cases. Torch is not, nor are GPUs:
there the logits agree within float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import clsa
from clsa.batch import SequenceChunk, build_batch
from clsa.config import EngineConfig, SamplingParams
from clsa.llm import LLM
from clsa.model import forward, new_state
from clsa.request import Request
from clsa.residency import num_pages
from tests.engine import models
from tests.engine.models import CONFIG, exchange_ops, on_backends

DOCUMENT = [int(token) for token in np.random.default_rng(0).integers(2, CONFIG.vocab_size, 700)]
QUESTIONS = [DOCUMENT[i : i + n] for i, n in enumerate((1, 3, 5, 40, 64, 130))]
HOW = SamplingParams(max_tokens=3, ignore_eos=True)


class Recorder:
    """Ops that keep the logits of every sample, on the host."""

    def __init__(self, llm: LLM) -> None:
        self._ops = llm._ops
        self.logits: list[np.ndarray] = []
        exchange_ops(llm, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def sample(self, logits: Any, sampling: Any) -> Any:
        self.logits.append(self._ops.to_numpy(logits))
        return self._ops.sample(logits, sampling)


def load(backend: str, **engine: Any) -> LLM:
    sizes = EngineConfig(**{"max_num_seqs": 2, "max_tokens_per_step": 256} | engine)
    device = None if backend == "numpy" else "cpu"
    return clsa.load(str(models.folder()), backend, device, "float32", engine=sizes)


def answer(llm: LLM, prompt: list[int], salt: str = "") -> tuple[list[np.ndarray], list[int], Request]:
    """Logits of every token of the answer, where the chunks of the prompt ended, and the request."""
    recorder, cuts = Recorder(llm), []
    request = llm._request(prompt, HOW, 0, salt, None)
    schedule = llm._engine.scheduler.schedule

    def note() -> Any:
        plan = schedule()
        cuts.extend([chunk.stop for chunk in plan.chunks] if plan else [])
        return plan

    llm._engine.scheduler.schedule = note  # type: ignore[method-assign]
    list(llm._deltas(request, None, None))
    del llm._engine.scheduler.schedule
    return recorder.logits, cuts[: -(HOW.max_tokens - 1)], request


def recompute(llm: LLM, prompt: list[int], cuts: Sequence[int]) -> np.ndarray:
    """The prompt's last logits from an empty state, computed in these chunks."""
    ops, pages = llm._ops, num_pages(len(prompt))
    state = new_state(ops, llm._plan, pages * 64, 1, "float32")
    logits = None
    for start, stop in zip((0, *cuts), cuts, strict=False):
        chunk = SequenceChunk(prompt[start:stop], start, range(pages), 0, "last" if stop == len(prompt) else "none")
        batch = build_batch(ops, [chunk], CONFIG.sliding_window)
        logits, state = forward(ops, llm._params, llm._plan, batch, state)
    assert logits is not None
    return ops.to_numpy(logits)


@on_backends
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: f"{len(question)}-tokens")
def test_a_hit_is_the_same_cuts_computed_again(backend: str, question: list[int]) -> None:
    llm = load(backend)
    _, first_cuts, _ = answer(llm, DOCUMENT)
    logits, cuts, request = answer(llm, DOCUMENT + question)
    assert 640 <= request.cached_tokens <= len(DOCUMENT)
    all_cuts = [cut for cut in first_cuts if cut <= request.cached_tokens] + cuts
    assert all_cuts[-1] == len(DOCUMENT) + len(question) and request.cached_tokens in all_cuts
    assert np.array_equal(logits[0], recompute(llm, DOCUMENT + question, all_cuts))


@pytest.mark.parametrize("backend", ["numpy", pytest.param("mlx", marks=pytest.mark.mlx)])
@pytest.mark.parametrize("budget", [256, 2048])
def test_a_hit_is_the_prompt_computed_again(backend: str, budget: int) -> None:
    for question, (hit, again) in with_and_without_a_hit(load(backend, max_tokens_per_step=budget)):
        for got, want in zip(hit, again):
            assert np.array_equal(got, want), question


def test_torch_is_within_rounding() -> None:
    for _, (hit, again) in with_and_without_a_hit(load("cuda")):
        for got, want in zip(hit, again):
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def with_and_without_a_hit(llm: LLM) -> Iterator[tuple[list[int], list[list[np.ndarray]]]]:
    answer(llm, DOCUMENT)
    for i, question in enumerate(QUESTIONS):
        hit, _, request = answer(llm, DOCUMENT + question)
        assert request.cached_tokens >= 640
        again, _, request = answer(llm, DOCUMENT + question, salt=f"{i}")  # a tenant who has nothing in the cache
        assert request.cached_tokens == 0
        assert len(hit) == len(again) == HOW.max_tokens
        yield question, [hit, again]
