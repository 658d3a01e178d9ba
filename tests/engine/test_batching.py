"""A request is answered the same alone, in any company, in chunks of any size, from the cache, after pre-emption.

200 mixed requests, greedy and seeded, with every sampling parameter. On the specification all of them run in every
setting; the slow settings of the other backends take the first of them (CLSA_ALL_REQUESTS=1 runs all everywhere).

Everything is held against the specification run alone, so the backends agree with each other too. Float32 rounding
depends on the shapes of a batch and could flip a token whose lead is within rounding; `test_leads` shows how far the
leads are from that here.
"""

from __future__ import annotations

import functools
import math
import os
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from clsa.config import SamplingParams
from clsa.llm import LLM
from clsa.outputs import RequestOutput
from tests.engine.models import CONFIG, assert_all_returned, load, mixed_requests, on_backends, sampling

REQUESTS = mixed_requests(200)
FEW = 200 if os.environ.get("CLSA_ALL_REQUESTS") else 20
Requests = Sequence[tuple[list[int], SamplingParams]]


@functools.cache
def alone() -> list[RequestOutput]:
    """Each request on the specification, one after the other, without a cache."""
    llm = load(prefix_cache_bytes=0)
    return [llm.generate([prompt], [params])[0] for prompt, params in REQUESTS]


def generate(llm: LLM, requests: Requests) -> list[RequestOutput]:
    outputs = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])
    assert_all_returned(llm.stats())
    return outputs


def assert_same(outputs: Sequence[RequestOutput], wanted: Sequence[RequestOutput]) -> None:
    for i, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        assert got.token_ids == want.token_ids, f"request {i}"
        assert (got.text, got.finish_reason, got.error) == (want.text, want.finish_reason, None)
        assert got.prompt_tokens == want.prompt_tokens
        assert (got.logprobs is None) == (want.logprobs is None)
        for a, b in zip(got.logprobs or (), want.logprobs or (), strict=True):
            assert a.token == b.token
            assert a.logprob == pytest.approx(b.logprob, rel=1e-4, abs=1e-4)
            assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], rel=1e-4, abs=1e-4)


def test_the_requests_are_a_mixture() -> None:
    lengths = [len(prompt) for prompt, _ in REQUESTS]
    assert min(lengths) == 1 and max(lengths) > 350
    outputs = alone()
    assert {output.finish_reason for output in outputs} == {"length", "stop"}
    assert sum(bool(params.stop) and out.finish_reason == "stop" for (_, params), out in zip(REQUESTS, outputs)) > 5
    assert max(len(output.token_ids) for output in outputs) >= 35
    assert len({token for output in outputs for token in output.token_ids}) > 150, "not the same token again and again"
    # Greedy and seeded requests, and rows that a penalty really changes, are all among them.
    plain = [SamplingParams(max_tokens=p.max_tokens, ignore_eos=True) for _, p in REQUESTS]
    greedy = load().generate([prompt for prompt, _ in REQUESTS], plain)
    differ = sum(a.token_ids[:1] != b.token_ids[:1] for a, b in zip(greedy, outputs))
    assert 20 < differ < 180


@on_backends
def test_alone(backend: str) -> None:
    """One at a time, but with the cache on."""
    count = 200 if backend == "numpy" else FEW
    llm = load(backend)
    assert_same([generate(llm, [request])[0] for request in REQUESTS[:count]], alone()[:count])


@on_backends
def test_together_and_again_from_the_cache(backend: str) -> None:
    llm = load(backend, max_num_seqs=64)
    assert_same(generate(llm, REQUESTS), alone())
    hit = llm.stats()["prefix_tokens_hit"]
    again = generate(llm, REQUESTS)
    assert_same(again, alone())
    assert llm.stats()["prefix_tokens_hit"] - hit > 4000
    assert sum(output.cached_tokens for output in again) == llm.stats()["prefix_tokens_hit"] - hit


@on_backends
def test_in_another_order(backend: str) -> None:
    order = random.Random(1).sample(range(200), 200)
    llm = load(backend, max_num_seqs=37)
    assert_same(generate(llm, [REQUESTS[i] for i in order]), [alone()[i] for i in order])
    assert llm.stats()["prefix_tokens_hit"] > 0


@on_backends
@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_chunks(backend: str, tokens: int) -> None:
    count = FEW if backend != "numpy" and tokens == 1 else 200
    llm = load(backend, max_tokens_per_step=tokens, prefix_cache_bytes=0)
    assert_same(generate(llm, REQUESTS[:count]), alone()[:count])
    total = sum(len(prompt) for prompt, _ in REQUESTS[:count])
    assert llm.stats()["steps"] >= total / tokens


@functools.cache
def growing() -> tuple[Requests, list[RequestOutput]]:
    """Requests that begin on one page and come to want five, and their answers on the specification."""
    rng = random.Random(2)
    requests = [
        (
            [rng.randrange(CONFIG.vocab_size) for _ in range(rng.randint(1, 60))],
            replace(sampling(rng, 200), ignore_eos=True, stop=(), stop_token_ids=()),
        )
        for _ in range(12)
    ]
    llm = load(prefix_cache_bytes=0)
    return requests, [llm.generate([prompt], [params])[0] for prompt, params in requests]


@pytest.mark.parametrize(
    ("backend", "cache"),
    [("numpy", 0), ("numpy", 1 << 24), ("cuda", 1 << 24), pytest.param("mlx", 1 << 24, marks=pytest.mark.mlx)],
)
def test_pre_emption(backend: str, cache: int) -> None:
    requests, wanted = growing()
    llm = load(backend, max_tokens_in_memory=512, max_tokens_per_step=128, prefix_cache_bytes=cache)
    assert_same(generate(llm, requests), wanted)
    assert llm.stats()["preemptions"] >= 5


def leads(llm: LLM, output: RequestOutput, prompt: list[int]) -> list[float]:
    """By how much the logit of each greedy token leads the next one, in units of the largest logit."""
    logits = llm.logits(prompt + output.token_ids[:-1])[len(prompt) - 1 :]
    best = np.sort(logits, axis=1)[:, -2:]
    return ((best[:, 1] - best[:, 0]) / np.abs(logits).max(axis=1)).tolist()


def test_leads() -> None:
    """Why equality may be asked for in float32: rounding moves logits by about 1e-6, and no lead is that small."""
    llm = load()
    greedy = [
        (prompt, output)
        for (prompt, params), output in zip(REQUESTS, alone())
        if not params.temperature and params.repetition_penalty == 1
    ]
    every = [lead for prompt, output in greedy for lead in leads(llm, output, prompt)]
    assert len(every) > 300
    assert min(every) > 2e-5, f"{sorted(every)[:5]}"
    assert math.isfinite(max(every))
