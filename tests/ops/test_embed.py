"""embed: rows of the table; the token -1 of a failed row does no harm."""

from __future__ import annotations

import numpy as np
import pytest

from clsa.ops import Ops
from tests.ops.cases import host, normal


@pytest.mark.parametrize("vocab_size", [2, 63, 1000])
@pytest.mark.parametrize("num_tokens", [1, 65])
def test_embed(ops: Ops, dtype: str, vocab_size: int, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    weight = normal(rng, vocab_size, 111, dtype=dtype)
    tokens = rng.integers(0, vocab_size, num_tokens).astype(np.int32)
    out = host(ops, ops.embed(ops.asarray(weight), ops.asarray(tokens)), dtype)
    assert np.array_equal(out, weight[tokens].astype(np.float64))


def test_token_minus_one_is_harmless(ops: Ops) -> None:
    weight = normal(np.random.default_rng(0), 5, 8, dtype="float32")
    tokens = np.array([3, -1, 4], np.int32)
    out = host(ops, ops.embed(ops.asarray(weight), ops.asarray(tokens)), "float32")
    assert np.isfinite(out).all() and np.array_equal(out[[0, 2]], weight[[3, 4]].astype(np.float64))
