"""The kernels of packed chunks against the specification: window, pages, index scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.config import MemoryDtypes
from clsa.errors import BackendError
from clsa.ops import Ops, Selection
from clsa_cuda.kernels import chunk_selection
from clsa_cuda.kernels import select as select_module
from clsa_cuda.kernels.causal_prefill import causal_prefill
from clsa_cuda.kernels.chunk_selection import ChunkSelection, with_marks
from clsa_cuda.kernels.prefill import PrefillTiles, prefill_tiles, query_tiles
from clsa_cuda.kernels.score_many import score_many
from clsa_cuda.kernels.select import select
from clsa_cuda.kernels.sliding_prefill import sliding_prefill
from clsa_cuda.kernels.tiles import Limits
from tests.cuda.conftest import DEVICE
from tests.cuda.test_kernel_select import SPECIAL, memory_of
from tests.ops.cases import (
    Chunk,
    Layout,
    filled_memory,
    filled_window,
    host,
    integers,
    layout,
    normal,
    poisoned,
    rounded,
)
from tests.ops.routing import Arrays, arrays
from tests.ops.test_sliding_attention import readable_ring
from tests.tolerance import SCORE_ERROR, assert_close, assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # NaN of padded rows, in the interpreter
SMALL = PrefillTiles(block_m=16, block_n=16, num_warps=4, num_stages=2)  # many blocks of few keys: all the loops
LARGE = PrefillTiles(block_m=64, block_n=128, num_warps=4, num_stages=2)  # blocks of two pages
TILES = pytest.mark.parametrize("tiles", [SMALL, LARGE], ids=["small", "large"])
# Chunks longer than the windows, ends that are no multiple of anything, steps with decode rows and padded rows.
STEPS = {
    "mixed": [Chunk(999, 1), Chunk(64, 63), Chunk(0, 5), Chunk(0, 0, padded=2), Chunk(60, 9, padded=3), Chunk(0, 1)],
    "long": [Chunk(0, 100), Chunk(37, 1), Chunk(301, 70, padded=2)],
}
CHUNKS = pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS.keys())
# (query heads, KV heads, head dim): groups of 1, 5 and 10 heads, dims that are no power of two.
HEADS = [(2, 2, 2), (5, 1, 80), (10, 1, 16)]


@TILES
@CHUNKS
@pytest.mark.parametrize("size, heads, kv_heads, head_dim", [(w, *h) for w, h in zip((1, 40, 63), HEADS)])
def test_sliding_prefill(
    ops: Ops,
    dtype: str,
    chunks: list[Chunk],
    size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tiles: PrefillTiles,
) -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    num_tokens, padded = len(step.positions), step.positions < 0
    q = normal(rng, num_tokens, heads, head_dim, dtype=dtype, scale=2.0)
    k, v = (normal(rng, num_tokens, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    for x in (q, k, v):
        x[padded] = np.nan  # a padded row may hold anything
    mask = readable_ring(step, size)
    ring = [poisoned(normal(rng, len(mask), kv_heads, head_dim, dtype=dtype), mask) for _ in range(2)]
    ours, theirs = filled_window(ops, ring[0], ring[1], size, dtype), filled_window(spec, ring[0], ring[1], size, dtype)
    got = sliding_prefill(ops.asarray(q), ops.asarray(k), ops.asarray(v), ours, step.queries(ops), tiles)
    want = spec.sliding_attention(spec.asarray(q), spec.asarray(k), spec.asarray(v), theirs, step.queries(spec))
    result = host(ops, got, dtype)
    assert not result[padded].any(), "a padded query must get zeros"
    assert_close("sliding_attention", dtype, result, want, (size, heads, kv_heads, head_dim))


@TILES
@CHUNKS
@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS[1:])
def test_causal_prefill(
    ops: Ops, dtype: str, chunks: list[Chunk], heads: int, kv_heads: int, head_dim: int, tiles: PrefillTiles
) -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    q = normal(rng, len(step.positions), heads, head_dim, dtype=dtype, scale=2.0)
    kv = [poisoned(normal(rng, step.num_rows, kv_heads, head_dim, dtype=dtype), step.readable) for _ in range(2)]
    q[step.positions < 0] = np.nan
    memory = filled_memory(ops, kv[0], kv[1], None, dtype)
    got = causal_prefill(ops.asarray(q), memory, step.queries(ops), tiles)
    want = spec.dense_attention(spec.asarray(q), filled_memory(spec, kv[0], kv[1], None, dtype), step.queries(spec))
    result = host(ops, got, dtype)
    assert not result[step.positions < 0].any(), "a padded query must get zeros"
    assert_close("dense_attention", dtype, result, want, (heads, kv_heads, head_dim))


@CHUNKS
@pytest.mark.parametrize("k, tiles", [(1, SMALL), (20, LARGE), (2048, LARGE)], ids=["1", "20", "all"])
def test_selections_of_chunks(
    ops: Ops, dtype: str, chunks: list[Chunk], k: int, tiles: PrefillTiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By marks, and without where everything is chosen; queries that see nothing get zeros."""
    rng = np.random.default_rng(3)
    step = layout(rng, chunks)
    monkeypatch.setattr(chunk_selection, "_TOKENS_EACH", 1)
    monkeypatch.setattr(chunk_selection, "_TIMES", 1024)
    q = normal(rng, len(step.positions), 10, 16, dtype=dtype, scale=2.0)
    kv = [poisoned(normal(rng, step.num_rows, 2, 16, dtype=dtype), step.readable) for _ in range(2)]
    q_idx, k_idx = (normal(rng, n, 16, dtype=dtype) for n in (len(q), step.num_rows))
    memory = filled_memory(spec, kv[0], kv[1], poisoned(k_idx, step.readable), dtype)
    chosen = spec.select(spec.asarray(q_idx), memory, step.queries(spec), k, 1)
    want = spec.gather_attention(spec.asarray(q), memory, chosen)
    selection = Selection(*(ops.asarray(x) for x in arrays(spec, chosen)))
    found = with_marks(selection, step.queries(ops))
    assert isinstance(found, ChunkSelection) and (found.marks is None) == (k == 2048)
    memory = filled_memory(ops, kv[0], kv[1], None, dtype)
    result = host(ops, causal_prefill(ops.asarray(q), memory, found.queries, tiles, found.marks), dtype)
    assert not result[step.positions < 0].any(), "a padded query must get zeros"
    assert_close("gather_attention", dtype, result, np.asarray(want), (k,))


def test_which_selections_are_marked(ops: Ops) -> None:
    def marked(chunks: list[Chunk], k: int = 64) -> bool:
        step = layout(np.random.default_rng(0), chunks)
        nothing = ops.asarray(np.full((len(step.positions), k), -1, np.int32))
        selection = Selection(nothing, nothing, ops.asarray(np.zeros(len(nothing), np.int32)))
        return isinstance(with_marks(selection, step.queries(ops)), ChunkSelection)

    assert marked([Chunk(0, 40)]) and marked([Chunk(0, 20), Chunk(50, 13)])
    assert not marked([Chunk(0, 8), Chunk(50, 8)]), "tiles would hold little"
    assert marked([Chunk(728, 40)]) and not marked([Chunk(729, 40)]), "12 times k tokens at most"


def test_memories_in_float8(ops: Ops, dtype: str) -> None:
    """As the numbers they stand for, in attention and in scores."""
    rng = np.random.default_rng(8)
    step = layout(rng, [Chunk(30, 40), Chunk(0, 7)])
    q, q_idx = (normal(rng, 47, *shape, dtype=dtype) for shape in ((4, 16), (16,)))
    k, v = (normal(rng, step.num_rows, 2, 16, dtype=dtype) for _ in range(2))
    k_idx, slots = normal(rng, step.num_rows, 16, dtype=dtype), np.arange(step.num_rows, dtype=np.int32)
    outs, chosen = [], []
    for o, attention, choose in ((ops, causal_prefill, select), (spec, spec.dense_attention, spec.select)):
        memory = o.new_memory(step.num_rows, 2, 16, 16, dtype, MemoryDtypes("fp8", "fp8"))
        memory = o.write_memory(memory, *(o.asarray(x) for x in (k, v, k_idx, slots)))
        outs.append(attention(o.asarray(q), memory, step.queries(o)))
        chosen.append(arrays(o, choose(o.asarray(q_idx), memory, step.queries(o), 20, 1)))
    assert_close("dense_attention", dtype, host(ops, outs[0], dtype), np.asarray(outs[1]))
    assert_equal("select", chosen[0][0], chosen[1][0])


@pytest.mark.parametrize("tiles", [SMALL, LARGE], ids=["small", "large"])
def test_some_rows_of_a_chunk(ops: Ops, dtype: str, tiles: PrefillTiles) -> None:
    """Positions with gaps, sequences that ask nothing, lengths that are only bounds, a table that is too wide."""
    rng = np.random.default_rng(1)
    whole = layout(rng, [Chunk(0, 150), Chunk(10, 4), Chunk(0, 70)])
    rows = np.array([0, 3, 64, 65, 149, 154, 223])
    counts = np.bincount(whole.sequence[rows], minlength=3)
    step = dataclasses.replace(
        whole,
        positions=whole.positions[rows],
        sequence=whole.sequence[rows],
        block_table=np.pad(whole.block_table, ((0, 0), (0, 2)), constant_values=-1),
        cu_seqlens=(0, *np.cumsum(counts).tolist()),
        context_lens=(200, 14, 4096),
    )
    q = normal(rng, len(rows), 4, 16, dtype=dtype, scale=2.0)
    kv = [poisoned(normal(rng, step.num_rows, 2, 16, dtype=dtype), whole.readable) for _ in range(2)]
    memory = filled_memory(ops, kv[0], kv[1], None, dtype)
    got = causal_prefill(ops.asarray(q), memory, step.queries(ops), tiles)
    want = spec.dense_attention(spec.asarray(q), filled_memory(spec, kv[0], kv[1], None, dtype), step.queries(spec))
    assert_close("dense_attention", dtype, host(ops, got, dtype), want)


def test_rows_of_wider_rows(ops: Ops, dtype: str) -> None:
    """Projections that one product made lie side by side; the default tiles."""
    rng = np.random.default_rng(2)
    step = layout(rng, [Chunk(130, 150), Chunk(0, 7)])
    wide = normal(rng, 157, 8, 16, dtype=dtype)
    ring = normal(rng, step.num_slots * 140, 2, 16, dtype=dtype)
    results = []
    for o, attention in ((ops, sliding_prefill), (spec, spec.sliding_attention)):
        x = o.asarray(wide)
        window = filled_window(o, ring, ring, 140, dtype)
        results.append(attention(x[:, :4], x[:, 4:6], x[:, 6:], window, step.queries(o)))
    assert_close("sliding_attention", dtype, host(ops, results[0], dtype), np.asarray(results[1]))


def test_large_scores_do_not_overflow(ops: Ops, dtype: str) -> None:
    """Scores of +-20000, the largest in the last block of several."""
    step = layout(np.random.default_rng(0), [Chunk(0, 48)])
    q = np.full((48, 1, 4), 200.0, np.float32)
    k = np.repeat([[[-100.0] * 4], [[99.0] * 4], [[100.0] * 4]], 16, axis=0).astype(np.float32)
    v = np.repeat(np.arange(12, dtype=np.float32).reshape(3, 1, 4), 16, axis=0)
    q, k, v = (ops.asarray(x, dtype) for x in (q, k, v))
    got = host(ops, sliding_prefill(q, k, v, ops.new_window(3, 48, 1, 4, dtype), step.queries(ops), SMALL), dtype)
    rounding = 1e-6 if dtype == "float32" else 0.0  # the other results are rounded to what is exact here
    np.testing.assert_allclose(got[[15, 31, 47], 0], np.arange(12.0).reshape(3, 4), rtol=rounding)


def scored(ops: Ops, step: Layout, q_idx: np.ndarray, k_idx: np.ndarray, dtype: str, k: int) -> Arrays:
    """The selection, and that nobody reads a row that nobody may see."""
    memory = memory_of(ops, poisoned(k_idx, step.readable), dtype)
    return arrays(ops, select(ops.asarray(q_idx), memory, step.queries(ops), k, 1))


@pytest.mark.parametrize("k", [1, 16, 150])
def test_exact_scores_with_ties_everywhere(ops: Ops, dtype: str, k: int) -> None:
    rng = np.random.default_rng(3)
    step = layout(rng, [Chunk(150, 9, padded=3), Chunk(200, 1), Chunk(0, 20), Chunk(0, 0, padded=1)])
    q_idx = rounded(rng.integers(-2, 3, (len(step.positions), 16)), dtype)
    k_idx = rounded(rng.integers(-2, 3, (step.num_rows, 16)), dtype)
    q_idx[step.positions < 0] = np.nan
    got = scored(ops, step, q_idx, k_idx, dtype, k)
    want = arrays(spec, spec.select(spec.asarray(q_idx), memory_of(spec, k_idx, dtype), step.queries(spec), k, 1))
    for name, a, b in zip(("positions", "rows", "lengths"), got, want):
        assert_equal(f"select {name}", a, b, (dtype, k))


@pytest.mark.parametrize("scores", SPECIAL.values(), ids=SPECIAL.keys())
def test_special_scores(ops: Ops, scores: Any) -> None:
    """The queries have one dimension that is not zero, so that a score is that of the key."""
    rng = np.random.default_rng(4)
    step = layout(rng, [Chunk(150, 3)])
    q_idx, k_idx = np.zeros((3, 16), np.float32), np.zeros((step.num_rows, 16), np.float32)
    q_idx[:, 5], k_idx[:, 5] = 1.0, scores(rng, step.num_rows)
    k_idx[:, :5] = rng.standard_normal((step.num_rows, 5))
    got = scored(ops, step, q_idx, k_idx, "float32", 40)
    for t, last in enumerate(step.positions):
        keys = k_idx[step.rows_of(0, np.arange(last + 1)), 5].astype(np.float64)
        assert_equal("select", got[0][t], spec.top_k(keys, 40, 1), t)


def part_of(step: Layout, start: int, stop: int) -> Layout:
    return dataclasses.replace(
        step,
        positions=step.positions[start:stop],
        sequence=step.sequence[start:stop],
        cu_seqlens=tuple(min(max(start, row), stop) - start for row in step.cu_seqlens),
    )


@pytest.mark.parametrize("index_dim", [16, 128])
def test_real_scores(ops: Ops, dtype: str, index_dim: int) -> None:
    rng = np.random.default_rng(5)
    step = layout(rng, [Chunk(0, 9), Chunk(60, 40)])
    q_idx, k_idx = (normal(rng, n, index_dim, dtype=dtype) for n in (49, step.num_rows))
    index_keys = memory_of(ops, k_idx, dtype).k_idx
    assert index_keys is not None
    keys, maxima = (integers(ops, x) for x in score_many(ops.asarray(q_idx), index_keys, step.queries(ops), group=8))
    for t, (sequence, last) in enumerate(zip(step.sequence, step.positions)):
        seen = k_idx[step.rows_of(sequence, np.arange(last + 1))].astype(np.float64)
        query = q_idx[t].astype(np.float64)
        slack = SCORE_ERROR[dtype] * np.linalg.norm(query) * np.linalg.norm(seen, axis=1)
        assert (np.abs(as_scores(keys[t, : last + 1]) - seen @ query) <= slack).all(), t
        for group in range(last // 8 + 1):
            assert maxima[t, group] == keys[t, 8 * group : min(8 * group + 8, last + 1)].max()


@pytest.mark.cuda  # NumPy's products, of which the interpreter's are made, depend on the row
@pytest.mark.parametrize("index_dim", [16, 128])
def test_scores_do_not_depend_on_the_chunk(ops: Ops, dtype: str, index_dim: int) -> None:
    """The same bits for a query alone in its tile, at another row of one, and beside another sequence."""
    rng = np.random.default_rng(5)
    whole = layout(rng, [Chunk(0, 300), Chunk(600, 400)])
    q_idx, k_idx = (normal(rng, n, index_dim, dtype=dtype) for n in (700, whole.num_rows))
    index_keys = memory_of(ops, k_idx, dtype).k_idx
    assert index_keys is not None
    keys = integers(ops, score_many(ops.asarray(q_idx), index_keys, whole.queries(ops), 8)[0])
    for start, stop in ((0, 1), (17, 40), (250, 400), (301, 700), (699, 700)):
        queries = part_of(whole, start, stop).queries(ops)
        got = integers(ops, score_many(ops.asarray(q_idx[start:stop]), index_keys, queries, 8)[0])
        for t in range(start, stop):
            seen = whole.positions[t] + 1
            assert np.array_equal(got[t - start, :seen], keys[t, :seen]), (start, stop, t)


def as_scores(keys: np.ndarray) -> np.ndarray:
    return np.where(keys < 0, keys ^ 0x7FFFFFFF, keys).astype(np.int32).view(np.float32)


def test_many_queries_go_in_parts(ops: Ops, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that end inside a sequence, and one of queries of two."""
    rng = np.random.default_rng(6)
    step = layout(rng, [Chunk(150, 5), Chunk(0, 9)])
    q_idx, k_idx = (rounded(rng.integers(-2, 3, (n, 16)), dtype) for n in (14, step.num_rows))
    want = scored(ops, step, q_idx, k_idx, dtype, 40)
    monkeypatch.setattr(select_module, "_MAX_SCRATCH_BYTES", 3 * 12 * 192)  # three queries of three pages
    for a, b in zip(scored(ops, step, q_idx, k_idx, dtype, 40), want):
        assert_equal("select", a, b)


def test_which_scores_are_taken_together(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several queries of a sequence; not those of a decode step, nor with sequences that ask nothing."""
    taken = []

    def spy(*args: Any) -> Any:
        taken.append(True)
        return score_many(*args)

    monkeypatch.setattr(select_module, "score_many", spy)
    for lengths, index_dim, many in (((1, 1), 16, False), ((2, 1), 16, True), ((1, 0), 16, False), ((2, 1), 24, False)):
        rng = np.random.default_rng(7)
        step = layout(rng, [Chunk(0, n) for n in lengths])
        q_idx, k_idx = (normal(rng, n, index_dim, dtype="float32") for n in (sum(lengths), step.num_rows))
        scored(ops, step, q_idx, k_idx, "float32", 4)
        assert bool(taken) == many, (lengths, index_dim)
        taken.clear()


def test_no_queries(ops: Ops, dtype: str) -> None:
    step = layout(np.random.default_rng(0), [Chunk(0, 0)])
    q, k = (ops.asarray(np.zeros((0, n, 16), np.float32), dtype) for n in (4, 2))
    window, memory = ops.new_window(3, 8, 2, 16, dtype), ops.new_memory(64, 2, 16, None, dtype)
    assert sliding_prefill(q, k, k, window, step.queries(ops)).shape == (0, 4, 16)
    assert causal_prefill(q, memory, step.queries(ops)).shape == (0, 4, 16)


def test_what_the_kernels_cannot_take(ops: Ops, dtype: str) -> None:
    other = "float16" if dtype == "float32" else "float32"
    step = layout(np.random.default_rng(0), [Chunk(0, 2)])
    x, window = ops.asarray(np.zeros((2, 2, 16), np.float32), dtype), ops.new_window(3, 8, 2, 16, other)
    with pytest.raises(BackendError, match=f"q and the window's k in one dtype, got torch.{dtype} and torch.{other}"):
        sliding_prefill(x, x, x, window, step.queries(ops))
    with pytest.raises(BackendError, match=f"q and the memory's k in one dtype, got torch.{dtype} and torch.{other}"):
        causal_prefill(x, ops.new_memory(64, 2, 16, None, other), step.queries(ops))


def test_query_tiles() -> None:
    """Every row of every sequence in one tile, the end of a sequence first; nothing for an empty one."""
    import torch

    tiles = query_tiles((0, 7, 7, 8), 5, 16, torch.device(DEVICE)).tolist()
    assert tiles == [[0, 32, 0, 7], [0, 16, 0, 7], [0, 0, 0, 7], [2, 0, 7, 1]]
    assert query_tiles((0, 0), 5, 16, torch.device(DEVICE)).shape == (0, 4)


@pytest.mark.parametrize("shared_memory", [64 << 10, 99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("head_dim, itemsize", [(2, 2), (64, 2), (80, 2), (128, 2), (256, 2), (1024, 2), (128, 4)])
@pytest.mark.parametrize("window", [False, True])
def test_tiles_fit(head_dim: int, itemsize: int, shared_memory: int, window: bool) -> None:
    tiles = prefill_tiles(head_dim, itemsize, Limits(132, shared_memory), window)
    padded = max(16, 1 << (head_dim - 1).bit_length())
    assert (tiles.block_m + 2 * tiles.num_stages * tiles.block_n) * padded * itemsize <= max(shared_memory, 96 << 10)
    assert tiles.block_m * padded <= 1 << 14 or tiles.block_m == 16
