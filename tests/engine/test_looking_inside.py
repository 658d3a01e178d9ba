"""Logits, selections and log-probabilities: what a user sees of the model, and that decoding agrees with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

import clsa
import clsa.inspect_model
from clsa import RequestError, SamplingParams
from clsa.llm import LLM
from tests.engine import models
from tests.engine.models import CROSS, FULL, SLIDING, on_backends

TEXTS = ["def read(path):\n", "class Point:", "x", "漢字 😀 in a string", models.TEXT]
SHORT = SamplingParams(max_tokens=16, ignore_eos=True)


@on_backends
def test_logprobs_are_those_of_the_logits(backend: str) -> None:
    llm = models.load(backend)
    ids = llm.tokenizer.encode(models.TEXT)
    for params in (SHORT, replace(SHORT, temperature=2.0, top_k=40, repetition_penalty=1.5, seed=5)):
        [output] = llm.generate([ids], replace(params, logprobs=4))
        logits = llm.logits(ids + output.token_ids).astype(np.float64)[len(ids) - 1 :]
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert output.logprobs is not None and len(output.logprobs) == 16
        for row, token, item in zip(logprobs, output.token_ids, output.logprobs):
            assert item.token == token
            assert item.logprob == pytest.approx(row[token], abs=1e-4)
            best = np.argsort(-row, kind="stable")[:4]
            assert [top for top, _ in item.top] == best.tolist()
            assert [value for _, value in item.top] == pytest.approx(row[best].tolist(), abs=1e-4)


def penalised(logits: np.ndarray, seen: list[int], penalty: float) -> int:
    """The best token after the penalty."""
    logits, rows = logits.astype(np.float64), sorted(set(seen))
    logits[rows] = np.where(logits[rows] > 0, logits[rows] / penalty, logits[rows] * penalty)
    return int(logits.argmax())


@on_backends
@pytest.mark.parametrize("penalty", [0.5, 1.5])
def test_a_penalty_counts_the_newest_token_too(backend: str, penalty: float) -> None:
    """Which the host does not know yet when the step that it counts in is launched."""
    llm = models.load(backend)
    prompts = [llm.tokenizer.encode(text) for text in TEXTS]
    outputs = llm.generate(prompts, replace(SHORT, max_tokens=40, repetition_penalty=penalty))
    would_differ = 0
    for prompt, output in zip(prompts, outputs):
        tokens = prompt + output.token_ids
        for i, row in enumerate(llm.logits(tokens[:-1])[len(prompt) - 1 :], start=len(prompt)):
            assert tokens[i] == penalised(row, tokens[:i], penalty)
            would_differ += tokens[i] != penalised(row, tokens[: i - 1], penalty)
    assert would_differ > 0


@on_backends
@pytest.mark.parametrize(
    ("layer_types", "pattern"),
    [
        ((SLIDING, SLIDING, CROSS, CROSS), "FS"),
        ((SLIDING, CROSS, CROSS, CROSS), "DFS"),
        ((FULL, FULL, FULL, FULL), "DFSF"),
        ((FULL, FULL, FULL, FULL), "DDDD"),
        ((SLIDING, CROSS, FULL, SLIDING), "FS"),
    ],
)
def test_decode_agrees_with_logits(backend: str, layer_types: tuple[str, ...], pattern: str) -> None:
    """Each greedy token is the best of `logits` at its place, for every layer plan; chunks are cut where they fall.

    No plan here computes an index in its very first layer: there, equal tokens have equal scores at all positions, and
    in float32 the rounding of a batch decides between them.
    """
    llm = models.load(
        backend, models.folder(layer_types=layer_types, index_topk_pattern=pattern), max_tokens_per_step=50
    )
    ids = llm.tokenizer.encode(models.TEXT)[:150]
    outputs = llm.generate([ids, ids[:70], ids[:1]], replace(SHORT, max_tokens=30))
    for prompt, output in zip((ids, ids[:70], ids[:1]), outputs):
        logits = llm.logits(prompt + output.token_ids[:-1])
        assert logits.dtype == np.float32 and logits.shape == (len(prompt) + 29, 320)
        assert logits[len(prompt) - 1 :].argmax(axis=1).tolist() == output.token_ids


def test_logits_of_a_longer_text_begin_the_same(llm: LLM) -> None:
    ids = (llm.tokenizer.encode(models.TEXT) * 4)[: clsa.inspect_model.CHUNK + 90]
    whole = llm.logits(ids)
    np.testing.assert_allclose(llm.logits(ids[:100]), whole[:100], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(llm.selection(ids[:100]), llm.selection(ids)[:100])


@on_backends
def test_selection(backend: str) -> None:
    llm = models.load(backend, models.folder(index_topk_pattern="FF"))
    ids = llm.tokenizer.encode(models.TEXT)[:130]
    for chosen in (llm.selection(ids), llm.selection(ids, layer=2), llm.selection(ids, layer=3)):
        assert chosen.shape == (130, 24) and chosen.dtype == np.int32
        for t, row in enumerate(chosen):
            kept = row[: min(24, t + 1)]
            assert (row[len(kept) :] == -1).all()
            assert kept[0] >= 0 and kept[-1] <= t and (np.diff(kept) > 0).all()
        assert len({tuple(row) for row in chosen[-20:]}) == 20, "each position chooses for itself"
    np.testing.assert_array_equal(llm.selection(ids), llm.selection(ids, layer=2))
    assert (llm.selection(ids, layer=3) != llm.selection(ids, layer=2)).any()
    assert llm.selection(ids[:3]).tolist() == [[0] + [-1] * 23, [0, 1] + [-1] * 22, [0, 1, 2] + [-1] * 21]


def test_selection_of_a_layer_that_has_none(llm: LLM) -> None:
    for layer in (0, 3, -1, 99, "2"):
        with pytest.raises(RequestError, match=r"layer must be one that computes an index \(\[2\]\)"):
            llm.selection([1, 2], layer=cast(int, layer))
    dense = models.load(model=models.folder(index_topk_pattern="DD"))
    with pytest.raises(RequestError, match="this model has none"):
        dense.selection([1, 2])


@pytest.mark.parametrize("ids", [[], [320], [-1], "text", None, [0.5], [True], 7])
def test_looking_inside_checks_its_ids(llm: LLM, ids: Any) -> None:
    for look in (llm.logits, llm.selection):
        with pytest.raises(RequestError):
            look(ids)


def test_what_would_not_fit_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clsa.inspect_model, "host_memory_stats", lambda: {"free": 4 * 320 * 10 - 1})
    with pytest.raises(RequestError, match="the result of 10 tokens needs 12,800 bytes and 12,799 are free"):
        llm.logits([1] * 10)
    monkeypatch.undo()
    monkeypatch.setattr(llm._ops, "memory_stats", lambda: {"free": 1000})
    with pytest.raises(RequestError, match=r"the state of 10 tokens needs [\d,]+ bytes and 1,000 are free"):
        llm.logits([1] * 10)
