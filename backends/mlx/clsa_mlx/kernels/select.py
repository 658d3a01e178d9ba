"""select for a decode step: exact, no sort, several threadgroups per query."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries, Selection
from clsa_mlx.kernels import THREADS
from clsa_mlx.kernels.load import load

_TOP_BINS = 2048
_KEYS = 512  # positions that a threadgroup scores


def select(q_idx: mx.array, memory: Memory, queries: Queries, k: int, threads: int = THREADS) -> Selection:
    """The k best visible positions of each query, as `Ops.select` with blocks of one token.

    Every launch reads what the one before wrote, so no threadgroup waits for another. Integer counts make the result
    independent of any order.

    Args: q_idx [T, I]; the longest page table must hold more than k tokens.
    """
    assert memory.k_idx is not None
    work = _scores(q_idx, memory.k_idx, queries, threads)
    threshold, reached = _threshold(work, queries.positions, k, threads)
    num_queries = q_idx.shape[0]
    positions, rows, lengths = load(
        "select_write",
        ("work", "threshold", "reached", "positions", "sequence", "block_table", "k"),
        ("chosen", "rows", "lengths"),
        ("digits",),
    )(
        inputs=[work, threshold, reached, queries.positions, queries.sequence, queries.block_table, k],
        template=[("P", PAGE_SIZE), ("THREADS", threads)],
        output_shapes=[(num_queries, k), (num_queries, k), (num_queries,)],
        output_dtypes=[mx.int32, mx.int32, mx.int32],
        **_grid(reached.shape[1], num_queries, threads),
    )
    return Selection(positions, rows, lengths)


def _scores(q: mx.array, k_idx: mx.array, queries: Queries, threads: int) -> mx.array:
    """Counts of top digits, then a key for each position: [T, _TOP_BINS + S] uint32."""
    num_queries, index_dim = q.shape
    length = queries.block_table.shape[1] * PAGE_SIZE
    return load(
        "select_scores",
        ("query", "k_idx", "positions", "sequence", "block_table"),
        ("work",),
        ("load", "digits"),
        atomic=True,
    )(
        inputs=[q, k_idx, queries.positions, queries.sequence, queries.block_table],
        template=[
            ("T", k_idx.dtype), ("I", index_dim), ("V", 4 if index_dim % 4 == 0 else 1),
            ("P", PAGE_SIZE), ("KEYS", _KEYS), ("THREADS", threads),
        ],
        output_shapes=[(num_queries, _TOP_BINS + length)],
        output_dtypes=[mx.uint32],
        init_value=0,
        **_grid(-(-length // _KEYS), num_queries, threads),
    )[0]  # fmt: skip


def _threshold(work: mx.array, positions: mx.array, k: int, threads: int) -> tuple[mx.array, mx.array]:
    """Key of the k-th best and how many ties it takes [T, 2]; keys above and ties of each block [T, blocks, 2]."""
    num_queries, length = work.shape[0], work.shape[1] - _TOP_BINS
    num_blocks = -(-length // (4 * threads))
    uints = [mx.uint32, mx.uint32]
    candidates, counts = load("select_candidates", ("work", "positions", "k"), ("candidates", "counts"), ("digits",))(
        inputs=[work, positions, k],
        template=[("THREADS", threads)],
        output_shapes=[(num_queries, length), (num_queries, num_blocks, 2)],
        output_dtypes=uints,
        **_grid(num_blocks, num_queries, threads),
    )
    threshold, reached = load(
        "select_threshold", ("work", "candidates", "counts", "positions", "k"), ("threshold", "reached"), ("digits",)
    )(
        inputs=[work, candidates, counts, positions, k],
        template=[("BLOCK", 4 * threads), ("THREADS", threads)],
        output_shapes=[(num_queries, 2), (num_queries, num_blocks, 2)],
        output_dtypes=uints,
        **_grid(num_queries, 1, threads),
    )
    return threshold, reached


def _grid(x: int, y: int, threads: int) -> dict[str, Any]:
    """Threadgroups along two axes."""
    return {"grid": (x * threads, y, 1), "threadgroup": (threads, 1, 1)}
