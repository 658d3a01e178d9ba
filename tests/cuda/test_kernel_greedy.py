"""The greedy sampler against the specification: ties, infinities, NaN, rows of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clsa import spec
from clsa.ops import SamplingBatch
from clsa_cuda.kernels.greedy import greedy
from tests.cuda.conftest import DEVICE


def expected(logits: np.ndarray) -> list[int]:
    n = len(logits)
    zeros, words = np.zeros(n, np.float32), np.zeros((n, 2), np.uint32)
    batch = SamplingBatch(
        temperature=zeros,
        top_k=np.zeros(n, np.int32),
        top_p=zeros + 1,
        min_p=zeros,
        repetition_penalty=zeros + 1,
        seed=words,
        positions=np.zeros(n, np.int32),
        penalty_tokens=None,
        num_logprobs=None,
        all_greedy=True,
        any_filter=False,
    )
    return spec.sample(logits.astype(np.float64), batch).tokens.tolist()


@pytest.mark.parametrize("rows, vocab", [(1, 1), (3, 1023), (2, 1024), (2, 5000), (40, 300)])
def test_random(rows: int, vocab: int) -> None:
    logits = np.random.default_rng(0).standard_normal((rows, vocab)).astype(np.float32)
    for _ in range(2):  # the counters are zero again
        assert greedy(torch.from_numpy(logits).to(DEVICE)).tolist() == expected(logits)


def test_ties_and_what_is_not_finite() -> None:
    logits = np.full((9, 3000), -1.0, np.float32)
    logits[0, [5, 2999]] = 2.0
    logits[1, 7], logits[1, 2500] = np.inf, np.nan
    logits[2, 2900] = np.nan
    logits[3] = -np.inf
    logits[4, 4] = np.inf
    logits[5] = [-0.0, 0.0] * 1500
    logits[6], logits[6, 77] = -np.inf, np.finfo(np.float32).min
    logits[7, 1234] = np.finfo(np.float32).max
    logits[8] = 0.0
    got = greedy(torch.from_numpy(logits).to(DEVICE)).tolist()
    assert got == expected(logits) == [5, -1, -1, -1, -1, 0, 77, 1234, 0]


def test_no_rows() -> None:
    assert greedy(torch.empty(0, 10, device=DEVICE)).shape == (0,)
