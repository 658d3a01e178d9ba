"""The decode attention kernels against the specification: selected rows, pages, the ring."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from clsa import spec
from clsa.errors import BackendError
from clsa.ops import Ops, Selection
from clsa_cuda.kernels.dense_attention import dense_attention
from clsa_cuda.kernels.gather_attention import compact_attention, compact_rows, gather_attention
from clsa_cuda.kernels.merge import merged
from clsa_cuda.kernels.sliding_attention import attend_window, sliding_attention
from clsa_cuda.kernels.tiles import MAX_SPLITS, AttentionTiles, ContextTiles, Limits, attention_tiles, context_tiles
from tests.ops.cases import (
    DECODE,
    Chunk,
    Layout,
    filled_memory,
    filled_window,
    host,
    layout,
    normal,
    poisoned,
    rounded,
)
from tests.ops.test_attend_window import compare
from tests.ops.test_gather_attention import ragged_selection
from tests.ops.test_sliding_attention import readable_ring
from tests.tolerance import assert_close

NUM_ROWS = 1024
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # log2 of an empty sum, in the interpreter
# (query heads, KV heads, head dim): groups of 1 to 16 heads, dims that are no power of two, smaller than a tile
HEADS = [(4, 4, 2), (10, 2, 64), (3, 1, 80), (16, 1, 96), (2, 1, 256)]
DECODE_HEADS = pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
STEP = pytest.mark.parametrize("chunks", DECODE.values(), ids=DECODE.keys())


def tiles(splits: int, block_n: int = 16) -> AttentionTiles:
    return AttentionTiles(block_n=block_n, splits=splits, num_warps=4, num_stages=2)


def shared_by(programs: int, block_n: int = 16) -> ContextTiles:
    return ContextTiles(block_n=block_n, programs=programs, num_warps=4, num_stages=3)


@pytest.mark.parametrize("compact", [False, True], ids=["in place", "compact"])
@pytest.mark.parametrize("num_queries, k, splits", [(1, 1, 1), (5, 63, 1), (4, 150, 8)])
@DECODE_HEADS
def test_gather_attention(
    ops: Ops,
    dtype: str,
    num_queries: int,
    k: int,
    splits: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    compact: bool,
) -> None:
    rng = np.random.default_rng(0)
    rows = ragged_selection(rng, num_queries, k)
    read = np.zeros(NUM_ROWS, bool)
    read[rows[rows >= 0]] = True
    q = normal(rng, num_queries, heads, head_dim, dtype=dtype, scale=2.0)
    kv = [poisoned(normal(rng, NUM_ROWS, kv_heads, head_dim, dtype=dtype), read) for _ in range(2)]
    lengths = (rows >= 0).sum(1).astype(np.int32)
    memory = filled_memory(ops, kv[0], kv[1], None, dtype)
    selection = Selection(ops.asarray(rows), ops.asarray(rows), ops.asarray(lengths))
    if compact:
        got = compact_attention(ops.asarray(q), compact_rows(memory, selection), tiles(splits))
    else:
        got = gather_attention(ops.asarray(q), memory, selection, tiles(splits))
    want = spec.gather_attention(
        spec.asarray(q), filled_memory(spec, kv[0], kv[1], None, dtype), Selection(rows, rows, lengths)
    )
    case = (num_queries, k, splits, heads, kv_heads, head_dim)
    result = host(ops, got, dtype)
    assert not result[lengths == 0].any(), f"{case}: a query that sees nothing must get zeros"
    assert_close("gather_attention", dtype, result, want, case)


@pytest.mark.parametrize(
    "splits, block_n, heads, kv_heads",
    [(19, 16, 5, 1), (1, 32, 10, 2), (5, 128, 20, 4)],  # 19: more than are merged at once
)
def test_any_tiles(ops: Ops, dtype: str, splits: int, block_n: int, heads: int, kv_heads: int) -> None:
    """Selected rows and rings: the same result as with one program for all keys."""
    rng = np.random.default_rng(5)
    step: Layout = layout(rng, [Chunk(n - 1, 1) for n in (150, 1, 64)] + [Chunk(0, 0, padded=1)])
    num_queries = len(step.positions)
    chosen = tiles(splits, block_n)
    q = ops.asarray(normal(rng, num_queries, heads, 16, dtype=dtype, scale=2.0), dtype)
    keys, values = (poisoned(normal(rng, step.num_rows, kv_heads, 16, dtype=dtype), step.readable) for _ in range(2))
    memory, queries = filled_memory(ops, keys, values, None, dtype), step.queries(ops)
    rows = ragged_selection(rng, num_queries, 70)
    rows = np.where(rows >= 0, step.rows_of(0, np.arange(70))[None], -1).astype(np.int32)
    selection = Selection(*(ops.asarray(x) for x in (rows, rows, (rows >= 0).sum(1).astype(np.int32))))
    k, v = (ops.asarray(normal(rng, num_queries, kv_heads, 16, dtype=dtype), dtype) for _ in range(2))
    mask = readable_ring(step, 40)
    ring_k, ring_v = (poisoned(normal(rng, len(mask), kv_heads, 16, dtype=dtype), mask) for _ in range(2))
    window = filled_window(ops, ring_k, ring_v, 40, dtype)
    for name, attention in (
        ("gather_attention", lambda t: gather_attention(q, memory, selection, t)),
        ("sliding_attention", lambda t: sliding_attention(q, k, v, window, queries, t)),
    ):
        want = host(ops, attention(tiles(1)), dtype).astype(np.float64)
        assert_close(name, dtype, host(ops, attention(chosen), dtype), want, (splits, block_n, heads, kv_heads))


def test_large_scores_do_not_overflow(ops: Ops, dtype: str) -> None:
    """Scores of +-20000 in different splits: the merge has to subtract the maximum too."""
    q = np.full((1, 1, 4), 200.0, np.float32)
    k = np.repeat([[[-100.0] * 4], [[100.0] * 4], [[99.0] * 4]], 16, axis=0)
    v = np.repeat(np.arange(12, dtype=np.float32).reshape(3, 1, 4), 16, axis=0)
    rows = ops.asarray(np.arange(48, dtype=np.int32)[None])
    selection = Selection(rows, rows, ops.asarray(np.array([48], np.int32)))
    memory = filled_memory(ops, rounded(k, dtype), rounded(v, dtype), None, dtype)
    got = host(ops, gather_attention(ops.asarray(q, dtype), memory, selection, tiles(4)), dtype)
    assert got[0, 0].tolist() == [4.0, 5.0, 6.0, 7.0]


# One for all, pieces of several queries, pieces of less than one, more programs than blocks.
@pytest.mark.parametrize("programs, block_n", [(1, 64), (7, 128), (40, 16)])
@STEP
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(1, 1, 2), (10, 2, 64)])
def test_dense_attention(
    ops: Ops,
    dtype: str,
    chunks: list[Chunk],
    heads: int,
    kv_heads: int,
    head_dim: int,
    programs: int,
    block_n: int,
) -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    q = normal(rng, len(step.positions), heads, head_dim, dtype=dtype, scale=2.0)
    kv = [poisoned(normal(rng, step.num_rows, kv_heads, head_dim, dtype=dtype), step.readable) for _ in range(2)]
    q[step.positions < 0] = np.nan  # a padded row may hold anything
    got = dense_attention(
        ops.asarray(q),
        filled_memory(ops, kv[0], kv[1], None, dtype),
        step.queries(ops),
        shared_by(programs, block_n),
    )
    want = spec.dense_attention(spec.asarray(q), filled_memory(spec, kv[0], kv[1], None, dtype), step.queries(spec))
    result = host(ops, got, dtype)
    assert not result[step.positions < 0].any(), "a padded query must get zeros"
    assert_close("dense_attention", dtype, result, want, (heads, kv_heads, head_dim, programs, block_n))


def test_a_longer_page_table_changes_nothing(ops: Ops) -> None:
    """Pages beyond the query, real ones or -1, are not read."""
    rng = np.random.default_rng(0)
    step = layout(rng, [Chunk(n - 1, 1) for n in (64, 1, 300, 65)])
    kv = [poisoned(normal(rng, step.num_rows, 2, 8, dtype="float32"), step.readable) for _ in range(2)]
    memory = filled_memory(ops, kv[0], kv[1], None, "float32")
    q = ops.asarray(normal(rng, len(step.positions), 4, 8, dtype="float32"))
    want = ops.to_numpy(dense_attention(q, memory, step.queries(ops), shared_by(3)))
    wider = np.pad(step.block_table, ((0, 0), (0, 3)), constant_values=-1)
    wider[:, -2] = step.block_table[0, 0]
    queries = dataclasses.replace(step, block_table=wider).queries(ops)
    got = ops.to_numpy(dense_attention(q, memory, queries, shared_by(3)))
    assert np.array_equal(got, want)


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("splits", [1, 4])
@STEP
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 2), (10, 2, 64)])
def test_sliding_attention(
    ops: Ops,
    dtype: str,
    chunks: list[Chunk],
    size: int,
    splits: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    rng = np.random.default_rng(0)
    step: Layout = layout(rng, chunks)
    num_tokens, padded = len(step.positions), step.positions < 0
    q = normal(rng, num_tokens, heads, head_dim, dtype=dtype, scale=2.0)
    own = [normal(rng, num_tokens, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    for x in (q, *own):
        x[padded] = np.nan  # a padded row may hold anything
    mask = readable_ring(step, size)
    ring = [poisoned(normal(rng, len(mask), kv_heads, head_dim, dtype=dtype), mask) for _ in range(2)]
    got, want = (
        attention(
            o.asarray(q),
            o.asarray(own[0]),
            o.asarray(own[1]),
            filled_window(o, ring[0], ring[1], size, dtype),
            step.queries(o),
        )
        for o, attention in (
            (ops, functools.partial(sliding_attention, tiles=tiles(splits))),
            (spec, spec.sliding_attention),
        )
    )
    result = host(ops, got, dtype)
    assert not result[padded].any(), "a padded query must get zeros"
    assert_close("sliding_attention", dtype, result, np.asarray(want), (size, splits, heads, kv_heads, head_dim))


@pytest.mark.parametrize("size, splits", [(1, 1), (7, 2), (64, 4)])
@DECODE_HEADS
@STEP
def test_attend_window(
    ops: Ops, dtype: str, chunks: list[Chunk], size: int, splits: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    attend = functools.partial(attend_window, tiles=tiles(splits))
    compare(ops, attend, dtype, chunks, size, heads, kv_heads, head_dim)


def test_split_results_do_not_depend_on_what_ran_before(ops: Ops) -> None:
    """The counters of arrivals are zero again after each launch, and a view of a wider tensor is read as it lies."""
    rng = np.random.default_rng(0)
    kv = [normal(rng, NUM_ROWS, 2, 16, dtype="float32") for _ in range(2)]
    memory = filled_memory(ops, kv[0], kv[1], None, "float32")
    wide = ops.asarray(normal(rng, 3, 3, 4, 16, dtype="float32"))
    results = []
    for splits in (4, 8, 4, 1):
        rows = ops.asarray(rng.permutation(NUM_ROWS)[:300].reshape(3, 100).astype(np.int32))
        selection = Selection(rows, rows, ops.asarray(np.full(3, 100, np.int32)))
        got = gather_attention(wide[:, 1], memory, selection, tiles(splits))
        want = spec.gather_attention(
            ops.to_numpy(wide[:, 1]).astype(np.float64),
            filled_memory(spec, kv[0], kv[1], None, "float32"),
            Selection(*(ops.to_numpy(x) for x in (rows, rows, selection.lengths))),
        )
        assert_close("gather_attention", "float32", ops.to_numpy(got), want, splits)
        results.append(got)


def test_no_queries(ops: Ops) -> None:
    memory = filled_memory(ops, *(rounded(np.zeros((64, 2, 8)), "float32"),) * 2, None, "float32")
    rows = ops.asarray(np.zeros((0, 5), np.int32))
    selection = Selection(rows, rows, ops.asarray(np.zeros(0, np.int32)))
    q = ops.asarray(np.zeros((0, 4, 8), np.float32))
    assert gather_attention(q, memory, selection).shape == (0, 4, 8)
    assert compact_attention(q, compact_rows(memory, selection)).shape == (0, 4, 8)


def test_what_the_kernels_cannot_take(ops: Ops) -> None:
    memory = filled_memory(ops, *(rounded(np.zeros((64, 2, 8)), "float32"),) * 2, None, "float32")
    rows = ops.asarray(np.zeros((1, 5), np.int32))
    selection = Selection(rows, rows, ops.asarray(np.full(1, 5, np.int32)))
    with pytest.raises(BackendError, match=r"q and k in one dtype, got torch.float16 and torch.float32"):
        gather_attention(ops.asarray(np.zeros((1, 4, 8), np.float32), "float16"), memory, selection)
    step = layout(np.random.default_rng(0), [Chunk(0, 2)])
    x = ops.asarray(np.zeros((2, 2, 8), np.float32))
    with pytest.raises(BackendError, match="one query a sequence; use the plain op for prefill"):
        sliding_attention(x, x, x, ops.new_window(3, 4, 2, 8, "float32"), step.queries(ops))


@pytest.mark.parametrize("shared_memory", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("head_dim, itemsize", [(64, 2), (80, 2), (128, 2), (256, 2), (128, 4), (256, 4)])
def test_tiles_fit(head_dim: int, itemsize: int, shared_memory: int) -> None:
    padded_dim = 1 << (head_dim - 1).bit_length()
    device = Limits(132, shared_memory)
    for num_queries in (1, 3, 8, 32, 64, 512, 1 << 14):
        whole = context_tiles(4 * num_queries, head_dim, itemsize, device)
        row_bytes = 2 * padded_dim * itemsize
        assert whole.num_stages // 2 * whole.block_n * row_bytes <= shared_memory
        # One program a multiprocessor: two find no place there.
        assert itemsize == 4 or 2 * (whole.num_stages // 2 * whole.block_n * row_bytes) > 0.9 * shared_memory
        assert itemsize == 4 or 0.9 * 132 < whole.programs <= 132
    for num_queries, max_keys in itertools.product([1, 8, 32, 64, 512, 1 << 20], [1, 64, 512, 2048]):
        chosen = attention_tiles(num_queries, 4, max_keys, head_dim, itemsize, device)
        # The first block, and those on their way: row numbers that come first take every second stage.
        blocks = chosen.num_stages if max_keys <= 1024 else (chosen.num_stages + 1) // 2
        assert blocks * chosen.block_n * 2 * padded_dim * itemsize <= shared_memory
        assert 1 <= chosen.splits <= MAX_SPLITS and chosen.block_n in (16, 32, 64, 128)
        assert chosen.splits == 1 or num_queries * 4 <= 1 << 16


def test_what_is_merged_at_once_fits_the_registers() -> None:
    """Of a multiprocessor's 65,536 those of one program, and a quarter of them where several share it."""
    assert merged(33, 132, 5, 128, 8, 132) == 33
    assert merged(33, 165, 5, 128, 8, 132) == 8 and merged(33, 132, 5, 128, 4, 132) == 8
    for splits, pairs, heads, head_dim, warps in itertools.product(
        (1, 2, 3, 9, 33, 64), (1, 4, 64), (1, 5, 16, 64), (64, 80, 256), (4, 8)
    ):
        at_once = merged(splits, pairs * splits, heads, head_dim, warps, 132)
        padded = (1 << (heads - 1).bit_length()) * (1 << (head_dim - 1).bit_length())
        assert at_once == 1 or at_once * padded <= (132 if pairs * splits <= 132 else 34) * 32 * warps


def test_programs_find_a_place_at_once() -> None:
    """As many as the registers of a multiprocessor allow, or they pile up."""
    for num_queries in range(1, 66):
        t = attention_tiles(num_queries, 4, 2048, 128, 2, Limits(132, 227 << 10))
        places = 132 * {128: 1 if t.last else 2, 64: 2 if t.last else 4}[t.block_n]
        programs = num_queries * 4 * t.splits
        assert programs <= places or t.splits == 1
        assert programs >= 0.67 * places or t.block_n == 128, (num_queries, t)


def test_equal_lengths_are_shared_without_pieces_of_two() -> None:
    """Where that costs few multiprocessors: powers of two, and what fills 132 exactly."""
    for pairs, programs in ((4, 132), (8, 128), (33, 132), (64, 128), (128, 128), (256, 128), (20, 132), (160, 132)):
        assert context_tiles(pairs, 128, 2, Limits(132, 227 << 10)).programs == programs


def test_any_lengths_are_shared_evenly(ops: Ops, dtype: str) -> None:
    """Random steps: rows without keys, of one block, one long row among short ones; any number of programs."""
    rng = np.random.default_rng(3)
    for _ in range(4):
        lengths = rng.choice([0, 1, 15, 16, 17, 64, 300], 7)
        step = layout(rng, [Chunk(n - 1, 1) if n else Chunk(0, 0, padded=1) for n in lengths.tolist()])
        keys, values = (poisoned(normal(rng, step.num_rows, 2, 16, dtype=dtype), step.readable) for _ in range(2))
        q = normal(rng, len(lengths), 6, 16, dtype=dtype, scale=2.0)
        want = spec.dense_attention(spec.asarray(q), filled_memory(spec, keys, values, None, dtype), step.queries(spec))
        memory, queries = filled_memory(ops, keys, values, None, dtype), step.queries(ops)
        for programs in (1, int(rng.integers(2, 16))):
            got = host(ops, dense_attention(ops.asarray(q), memory, queries, shared_by(programs)), dtype)
            assert not got[step.positions < 0].any(), "a query that sees nothing must get zeros"
            assert_close("dense_attention", dtype, got, want, (lengths.tolist(), programs))
