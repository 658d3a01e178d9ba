"""attend_window: QK norm, rotary positions, the ring before the chunk, and the chunk's write, as one op."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.ops import HeadNorms, Ops
from tests.ops.cases import STEPS, Chunk, filled_window, host, layout, normal, poisoned
from tests.ops.test_sliding_attention import readable_ring
from tests.tolerance import assert_close

DECODE = {"decode": [Chunk(0, 1), Chunk(5, 1), Chunk(63, 1), Chunk(64, 1), Chunk(200, 1)]}
CASES = STEPS | DECODE


@pytest.mark.parametrize("chunks", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 1, 16), (4, 2, 64), (6, 2, 10), (10, 2, 128)])
def test_attend_window(
    ops: Ops, dtype: str, chunks: list[Chunk], size: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    compare(ops, ops.attend_window, dtype, chunks, size, heads, kv_heads, head_dim)


def compare(
    ops: Ops,
    attend_window: Callable[..., Any],
    dtype: str,
    chunks: list[Chunk],
    size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    """Hold a function of arrays of `ops` against the specification: what it returns, what it writes and what not."""
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    num_tokens, padded = len(step.positions), step.positions < 0
    q = normal(rng, num_tokens, heads, head_dim, dtype=dtype, scale=2.0)
    k, v = (normal(rng, num_tokens, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    norms = [normal(rng, head_dim, dtype=dtype) for _ in range(2)]
    for x in (q, k, v):
        x[padded] = np.nan  # a padded row may hold anything
    mask = readable_ring(step, size)
    ring = [poisoned(normal(rng, len(mask), kv_heads, head_dim, dtype=dtype), mask) for _ in range(2)]
    mapping = ring_mapping(step.positions, step.sequence, step.window_slots, step.cu_seqlens, size)
    sides: list[tuple[Any, Callable[..., Any]]] = [(ops, attend_window), (spec, spec.attend_window)]
    results = [
        attend(
            *(o.asarray(x) for x in (q, k, v)),
            HeadNorms(o.asarray(norms[0]), o.asarray(norms[1]), 1e-6, 1e4),
            filled_window(o, ring[0], ring[1], size, dtype),
            step.queries(o),
            o.asarray(mapping),
        )
        for o, attend in sides
    ]
    (got, window), (want, want_window) = results
    result = host(ops, got, dtype)
    assert not result[padded].any(), "a padded query must get zeros"
    assert_close("attend_window", dtype, result, want, (size, heads, kv_heads, head_dim))
    written = mapping[mapping >= 0]
    untouched = np.setdiff1d(np.flatnonzero(mask), written)
    for name in ("k", "v"):
        after, want_after = host(ops, getattr(window, name), dtype), getattr(want_window, name)
        assert_close("norm_rope", dtype, after[written], want_after[written], name)
        assert np.array_equal(after[untouched], want_after[untouched])


def ring_mapping(
    positions: np.ndarray, sequence: np.ndarray, slots: np.ndarray, cu_seqlens: tuple[int, ...], size: int
) -> np.ndarray:
    """Where each token goes: the last W of each chunk to their place in the ring, all others nowhere."""
    mapping = np.full(len(positions), -1, np.int32)
    for b, (first, last) in enumerate(pairwise(cu_seqlens)):
        for t in range(max(first, last - size), last):
            if positions[t] >= 0:
                mapping[t] = slots[b] * size + positions[t] % size
    return mapping
