"""The plain torch ops with room for only a few keys or queries at a time: more blocks, the same results."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops, Selection
from tests.ops.cases import STEPS, Chunk, filled_memory, filled_window, host, layout, normal, poisoned, rounded
from tests.ops.routing import arrays
from tests.tolerance import assert_close, assert_equal

STEP = pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS.keys())
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


@pytest.fixture(params=[1, 5_000, 60_000])
def torch_ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ops]:
    pytest.importorskip("torch")
    import clsa_cuda
    from clsa_cuda import attention, dense_attention, select, sliding_attention

    monkeypatch.setattr(attention, "MAX_TEMPORARY_BYTES", request.param)
    for module in (dense_attention, select, sliding_attention):
        monkeypatch.setattr(module, "MAX_QUERIES", 7)
    yield clsa_cuda.backend.open("cpu")


@STEP
def test_dense_attention(torch_ops: Ops, chunks: list[Chunk]) -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    q = normal(rng, len(step.positions), HEADS, HEAD_DIM, dtype="float32")
    shape = (step.num_rows, KV_HEADS, HEAD_DIM)
    kv = [poisoned(normal(rng, *shape, dtype="float32"), step.readable) for _ in range(2)]
    got, want = (
        o.dense_attention(o.asarray(q), filled_memory(o, kv[0], kv[1], None, "float32"), step.queries(o))
        for o in (torch_ops, spec)
    )
    assert_close("dense_attention", "float32", host(torch_ops, got, "float32"), want)


@STEP
def test_sliding_attention(torch_ops: Ops, chunks: list[Chunk]) -> None:
    rng = np.random.default_rng(0)
    step, size = layout(rng, chunks), 21
    q = normal(rng, len(step.positions), HEADS, HEAD_DIM, dtype="float32")
    k, v = (normal(rng, len(step.positions), KV_HEADS, HEAD_DIM, dtype="float32") for _ in range(2))
    ring = normal(rng, step.num_slots * size, KV_HEADS, HEAD_DIM, dtype="float32")
    got, want = (
        o.sliding_attention(
            o.asarray(q), o.asarray(k), o.asarray(v), filled_window(o, ring, ring, size, "float32"), step.queries(o)
        )
        for o in (torch_ops, spec)
    )
    assert_close("sliding_attention", "float32", host(torch_ops, got, "float32"), want)


def test_gather_attention(torch_ops: Ops) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 128, (33, 65)).astype(np.int32)
    lengths = rng.integers(0, 66, 33).astype(np.int32)
    rows[np.arange(65) >= lengths[:, None]] = -1
    q = normal(rng, 33, HEADS, HEAD_DIM, dtype="float32")
    kv = normal(rng, 128, KV_HEADS, HEAD_DIM, dtype="float32")
    got, want = (
        o.gather_attention(
            o.asarray(q),
            filled_memory(o, kv, kv, None, "float32"),
            Selection(*(o.asarray(x) for x in (rows, rows, lengths))),
        )
        for o in (torch_ops, spec)
    )
    assert_close("gather_attention", "float32", host(torch_ops, got, "float32"), want)


@STEP
@pytest.mark.parametrize("block_size", [1, 4])
def test_select(torch_ops: Ops, chunks: list[Chunk], block_size: int) -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    q_idx = rounded(rng.integers(-2, 3, (len(step.positions), 8)), "float32")
    k_idx = poisoned(rounded(rng.integers(-2, 3, (step.num_rows, 8)), "float32"), step.readable)
    kv = np.zeros((step.num_rows, 1, 2), np.float32)
    got, want = (
        arrays(
            o,
            o.select(o.asarray(q_idx), filled_memory(o, kv, kv, k_idx, "float32"), step.queries(o), 48, block_size),
        )
        for o in (torch_ops, spec)
    )
    for a, b in zip(got, want):
        assert_equal("select", a, b)
