"""sliding_attention: the ring before the chunk, the chunk itself, W positions and no more."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops
from tests.ops.cases import STEPS, Chunk, Layout, filled_window, host, layout, normal, poisoned
from tests.tolerance import assert_close

HEADS = [(1, 1, 2), (4, 2, 64), (6, 2, 10), (8, 1, 16)]


def readable_ring(step: Layout, size: int) -> np.ndarray:
    """Ring rows that hold one of the W - 1 positions before a chunk."""
    out = np.zeros(step.num_slots * size, bool)
    for b, slot in enumerate(step.window_slots):
        first = step.positions[step.cu_seqlens[b]]
        before = np.arange(max(0, first - size + 1), first)
        out[slot * size + before % size] = True
    return out


@pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("size", [1, 7, 64, 1024])
@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_sliding_attention(
    ops: Ops, dtype: str, chunks: list[Chunk], size: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    num_tokens, padded = len(step.positions), step.positions < 0
    q = normal(rng, num_tokens, heads, head_dim, dtype=dtype, scale=2.0)
    own = [normal(rng, num_tokens, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    for x in (q, *own):
        x[padded] = np.nan  # a padded row may hold anything
    mask = readable_ring(step, size)
    ring = [poisoned(normal(rng, len(mask), kv_heads, head_dim, dtype=dtype), mask) for _ in range(2)]
    got, want = (
        o.sliding_attention(
            o.asarray(q),
            o.asarray(own[0]),
            o.asarray(own[1]),
            filled_window(o, ring[0], ring[1], size, dtype),
            step.queries(o),
        )
        for o in (ops, spec)
    )
    result = host(ops, got, dtype)
    assert not result[padded].any(), "a padded query must get zeros"
    assert_close("sliding_attention", dtype, result, want, (size, heads, kv_heads, head_dim))


def test_a_window_of_one_is_the_token_itself(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, [Chunk(5, 3), Chunk(0, 1)])
    q, k, v = (normal(rng, 4, 2, 8, dtype=dtype) for _ in range(3))
    ring = normal(rng, step.num_slots, 2, 8, dtype=dtype)
    window = filled_window(ops, ring, ring, 1, dtype)
    got = ops.sliding_attention(ops.asarray(q), ops.asarray(k), ops.asarray(v), window, step.queries(ops))
    assert np.array_equal(host(ops, got, dtype), v.astype(np.float64))
