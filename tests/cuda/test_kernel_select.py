"""The select kernels against the specification: exact, in ascending order, whatever the scores are."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.errors import BackendError
from clsa.ops import Memory, Ops
from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters
from clsa_cuda.kernels.select import select
from clsa_cuda.kernels.tiles import Limits, SelectTiles, select_tiles
from tests.cuda.conftest import DEVICE
from tests.ops.cases import STEPS, Chunk, Layout, filled_memory, layout, normal, poisoned, rounded
from tests.ops.routing import arrays, assert_best, assert_form
from tests.tolerance import SCORE_ERROR, assert_equal

# One token, k - 1, k, k + 1 tokens, a full page and one more, no token at all.
EDGES = [Chunk(n - 1, 1) if n else Chunk(0, 0, padded=1) for n in (1, 15, 16, 17, 0, 63, 64, 65, 130)]


def memory_of(ops: Ops, k_idx: np.ndarray, dtype: str) -> Memory:
    kv = rounded(np.zeros((len(k_idx), 1, 2)), dtype)
    return filled_memory(ops, kv, kv, k_idx, dtype)


def check(
    ops: Ops,
    step: Layout,
    q_idx: np.ndarray,
    k_idx: np.ndarray,
    dtype: str,
    k: int,
    tiles: SelectTiles | None = None,
) -> None:
    """Bit for bit what the specification chooses; rows that nobody may see hold NaN."""
    k_idx = poisoned(k_idx, step.readable)
    got = arrays(ops, select(ops.asarray(q_idx), memory_of(ops, k_idx, dtype), step.queries(ops), k, 1, tiles))
    want = arrays(spec, spec.select(spec.asarray(q_idx), memory_of(spec, k_idx, dtype), step.queries(spec), k, 1))
    assert_form((dtype, k), step, got, k, 1)
    for name, a, b in zip(("positions", "rows", "lengths"), got, want):
        assert_equal(f"select {name}", a, b, (dtype, k))


@pytest.mark.parametrize("chunks", [*STEPS.values(), EDGES], ids=[*STEPS, "edges"])
@pytest.mark.parametrize("k", [1, 16])
def test_exact_scores_with_ties_everywhere(ops: Ops, dtype: str, chunks: list[Chunk], k: int) -> None:
    rng = np.random.default_rng(0)
    chunks = [dataclasses.replace(c, length=min(c.length, 3)) for c in chunks]  # the interpreter is slow
    step = layout(rng, chunks)
    q_idx = rounded(rng.integers(-2, 3, (len(step.positions), 16)), dtype)
    k_idx = rounded(rng.integers(-2, 3, (step.num_rows, 16)), dtype)
    q_idx[step.positions < 0] = np.nan
    check(ops, step, q_idx, k_idx, dtype, k)


SPECIAL = {
    "all-nan": lambda rng, n: np.full(n, np.nan),
    "all-minus-inf": lambda rng, n: np.full(n, -np.inf),
    "all-plus-inf": lambda rng, n: np.full(n, np.inf),
    "all-equal": lambda rng, n: np.zeros(n),
    "both-signs-of-zero": lambda rng, n: rng.choice([0.0, -0.0], n),
    "everything": lambda rng, n: rng.choice([np.nan, -np.inf, np.inf, -1.0, 0.0, 1.0, 60000.0, -60000.0], n),
    "mostly-nan": lambda rng, n: np.where(rng.random(n) < 0.95, np.nan, 1.0),
    "descending": lambda rng, n: -np.arange(n, dtype=float),
    "best-side-by-side": lambda rng, n: np.where(np.arange(n) % 512 < 100, 1.0 + rng.random(n), rng.random(n)),
    "subnormal": lambda rng, n: rng.integers(-3, 4, n) * 1e-7,
}


# Small enough for what the tests can afford to go by way of lists, several blocks of them if they are long.
LISTS = dataclasses.replace(
    select_tiles(3, 24, 20, Limits(132, 227 << 10)),
    group=8,
    search_tile=64,
    list_tile=128,
    chosen_tile=256,
    pick_splits=4,
)


@pytest.mark.parametrize("scores", SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize("k, tiles", [(16, None), (300, None), (40, LISTS)], ids=["16", "300", "lists"])
def test_special_scores(ops: Ops, dtype: str, scores: Any, k: int, tiles: SelectTiles | None) -> None:
    """The index has one dimension, so that a score is the key itself."""
    rng = np.random.default_rng(1)
    step = layout(rng, [Chunk(n - 1, 1) for n in (700, 1, 300, 65)])
    k_idx = rounded(scores(rng, step.num_rows)[:, None], dtype)
    check(ops, step, rounded(np.ones((4, 1)), dtype), k_idx, dtype, k, tiles)


@pytest.mark.parametrize("group", [4, 64])
@pytest.mark.parametrize("search_tile", [32, 1024])
@pytest.mark.parametrize("pick_splits, chosen_tile", [(1, 64), (3, 256), (5, 4096)])
@pytest.mark.parametrize("values", [2, 10**6])
def test_all_tile_sizes(
    ops: Ops, group: int, search_tile: int, pick_splits: int, chosen_tile: int, values: int
) -> None:
    """Maxima, slices and lists larger than the tiles they go in, and smaller: the same selection."""
    if DEVICE == "cpu" and (group, search_tile, values) == (64, 32, 2) and pick_splits > 1:
        pytest.skip("the interpreter takes half a minute or a whole one for it")
    rng = np.random.default_rng(2)
    step = layout(rng, [Chunk(n - 1, 1) for n in (800, 333, 5)])
    k_idx = rounded(rng.integers(0, values, (step.num_rows, 1)), "float32")
    tiles = dataclasses.replace(
        LISTS, group=group, search_tile=search_tile, chosen_tile=chosen_tile, pick_splits=pick_splits
    )
    check(ops, step, rounded(np.ones((3, 1)), "float32"), k_idx, "float32", 20, tiles)
    assert not arrival_counters(ops.asarray(k_idx).device).any(), "the next launch would miss an arrival"


@pytest.mark.parametrize("k", [1, 600])
def test_a_context_too_long_to_be_searched_whole(ops: Ops, k: int) -> None:
    """With the default tiles; a sequence that ends in the middle of a slice, and one with fewer groups than k."""
    rng = np.random.default_rng(5)
    step = layout(rng, [Chunk(n - 1, 1) for n in (20_001, 17_000, 9_000, 599, 1)])
    k_idx = rounded(rng.integers(0, 10**6, (step.num_rows, 1)), "float32")
    check(ops, step, rounded(np.ones((5, 1)), "float32"), k_idx, "float32", k)


@pytest.mark.parametrize("index_dim", [1, 65, 128])
def test_real_scores(ops: Ops, dtype: str, index_dim: int) -> None:
    rng = np.random.default_rng(3)
    step = layout(rng, [Chunk(n - 1, 1) for n in (1000, 63, 257)])
    q_idx = normal(rng, 3, index_dim, dtype=dtype)
    k_idx = normal(rng, step.num_rows, index_dim, dtype=dtype)
    k = 63
    got = arrays(ops, select(ops.asarray(q_idx), memory_of(ops, k_idx, dtype), step.queries(ops), k, 1))
    assert_form((dtype, k), step, got, k, 1)
    for t, (last, sequence) in enumerate(zip(step.positions, step.sequence)):
        keys = k_idx[step.rows_of(sequence, np.arange(last + 1))].astype(np.float64)
        query = q_idx[t].astype(np.float64)
        slack = SCORE_ERROR[dtype] * np.linalg.norm(query) * np.linalg.norm(keys, axis=1).max()
        assert_best((dtype, t), got[0][t, : got[2][t]], keys @ query, k, 1, slack)


def test_many_queries_go_in_parts(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    import clsa_cuda.kernels.select as module

    monkeypatch.setattr(module, "_MAX_SCRATCH_BYTES", 2 * 12 * 192)  # two queries of three pages
    rng = np.random.default_rng(4)
    step = layout(rng, [Chunk(150, 7)])
    q_idx = rounded(rng.integers(-2, 3, (7, 8)), "float32")
    check(ops, step, q_idx, rounded(rng.integers(-2, 3, (step.num_rows, 8)), "float32"), "float32", 40)


def test_no_queries(ops: Ops) -> None:
    step = dataclasses.replace(
        layout(np.random.default_rng(0), [Chunk(0, 1)]), positions=np.zeros(0), sequence=np.zeros(0)
    )
    memory = memory_of(ops, rounded(np.zeros((64, 8)), "float32"), "float32")
    got = select(ops.asarray(np.zeros((0, 8), np.float32)), memory, step.queries(ops), 5, 1)
    assert got.positions.shape == (0, 5) and got.lengths.shape == (0,)


def test_what_the_kernel_cannot_take(ops: Ops) -> None:
    step = layout(np.random.default_rng(0), [Chunk(0, 1)])
    memory = memory_of(ops, rounded(np.zeros((step.num_rows, 8)), "float32"), "float32")
    q_idx = ops.asarray(np.zeros((1, 8), np.float32))
    with pytest.raises(BackendError, match="index_topk up to 8192, got 8193"):
        select(q_idx, memory, step.queries(ops), 8193, 1)
    with pytest.raises(BackendError, match="index_block_size 1, got 4"):
        select(q_idx, memory, step.queries(ops), 8, 4)


@pytest.mark.parametrize("k", [1, 7, 2048, 8192])
def test_tiles_fit(k: int) -> None:
    """What the kernel relies on: two counts of a tile share 32 bits, sizes are powers of two."""
    for max_pages, num_queries in itertools.product([1, 3, 2048, 16384, 262144], [1, 32, 4096]):
        tiles = select_tiles(num_queries, max_pages, k, Limits(132, 227 << 10))
        assert max(tiles.search_tile, tiles.list_tile, tiles.chosen_tile) <= 32768
        sizes = (tiles.search_tile, tiles.list_tile, tiles.chosen_tile, tiles.group, tiles.pick_warps)
        assert all(n & (n - 1) == 0 for n in sizes) and 64 % tiles.group == 0
        assert tiles.pick_splits == 1 or num_queries <= MAX_ARRIVALS
        assert 1 <= tiles.splits <= max_pages and 1 <= tiles.pick_splits <= tiles.chosen_tile // 16
