"""Prompts of any length: temporaries stay bounded, and blocks give what the whole gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clsa.batch import SequenceChunk, build_batch
from clsa.ops import Memory, Ops, Queries, Window

pytestmark = pytest.mark.mlx
mx = pytest.importorskip("mlx.core")

CONTEXT, CHUNK, HEADS, KV_HEADS, DIM = 4096, 256, 8, 2, 32


@pytest.fixture(scope="module")
def ops() -> Ops:
    from clsa_mlx import backend

    return backend.open("cpu")


@pytest.fixture(scope="module")
def inputs(ops: Ops) -> dict[str, Any]:
    """Two chunks at the end of a long context, on interleaved pages."""
    chunks = [SequenceChunk([1] * CHUNK, CONTEXT - CHUNK, list(range(b, 128, 2)), b, "all") for b in range(2)]
    mx.random.seed(0)
    shape = (2 * CONTEXT, KV_HEADS, DIM)
    memory = ops.new_memory(2 * CONTEXT, KV_HEADS, DIM, 16, "float32")
    rows = mx.arange(2 * CONTEXT, dtype=mx.int32)
    k, v, k_idx = (mx.random.normal(s) for s in (shape, shape, (2 * CONTEXT, 16)))
    window = ops.new_window(2, 300, KV_HEADS, DIM, "float32")
    out = {
        "memory": ops.write_memory(memory, k, v, k_idx, rows),
        "window": ops.write_window(window, k[:600], v[:600], rows[:600]),
        "queries": build_batch(ops, chunks, 300).queries,
        "q": mx.random.normal((2 * CHUNK, HEADS, DIM)),
        "own": mx.random.normal((2 * CHUNK, KV_HEADS, DIM)),
        "q_idx": mx.random.normal((2 * CHUNK, 16)),
    }
    ops.evaluate(out)
    return out


def _dense(ops: Ops, q: Any, memory: Memory, queries: Queries, **_: Any) -> Any:
    return ops.dense_attention(q, memory, queries)


def _sliding(ops: Ops, q: Any, own: Any, window: Window, queries: Queries, **_: Any) -> Any:
    return ops.sliding_attention(q, own, own, window, queries)


def _select(ops: Ops, q_idx: Any, memory: Memory, queries: Queries, **_: Any) -> Any:
    return ops.select(q_idx, memory, queries, 256, 1).rows


def _gather(ops: Ops, q: Any, memory: Memory, **rest: Any) -> Any:
    return ops.gather_attention(q, memory, ops.select(rest["q_idx"], memory, rest["queries"], 256, 1))


OPS = [_dense, _sliding, _select, _gather]


@pytest.mark.parametrize("op", OPS)
def test_temporaries_stay_bounded(
    ops: Ops, inputs: dict[str, Any], op: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clsa_mlx import blocks

    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 << 20)
    mx.synchronize()
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    mx.eval(op(ops, **inputs))
    assert mx.get_peak_memory() - base < 10 * (4 << 20)


@pytest.mark.parametrize("op", OPS)
def test_blocks_give_what_the_whole_gives(
    ops: Ops, inputs: dict[str, Any], op: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clsa_mlx import blocks

    results = []
    for limit in (1 << 20, 1 << 30):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", limit)
        results.append(ops.to_numpy(op(ops, **inputs)))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_block_limits() -> None:
    from clsa_mlx.blocks import BLOCK_BYTES, blocks

    assert list(blocks(3, 10, BLOCK_BYTES // 3)) == [(3, 6), (6, 9), (9, 10)]
    assert list(blocks(0, 3, 10 * BLOCK_BYTES)) == [(0, 1), (1, 2), (2, 3)]
    assert list(blocks(0, 5, 1, at_most=4)) == [(0, 4), (4, 5)]
    assert list(blocks(4, 4, 1)) == []
