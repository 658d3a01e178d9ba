"""select for a decode step: exact, no sort, several threadgroups per query."""

from __future__ import annotations

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
    num_queries, index_dim = q_idx.shape
    length = queries.block_table.shape[1] * PAGE_SIZE
    num_blocks = -(-length // (4 * threads))
    blocks_grid = {"grid": (num_blocks * threads, num_queries, 1), "threadgroup": (threads, 1, 1)}
    counts_form = {"output_dtypes": [mx.uint32, mx.uint32]}
    paged = [queries.positions, queries.sequence, queries.block_table]
    (work,) = load(
        "select_scores",
        ("query", "k_idx", "positions", "sequence", "block_table"),
        ("work",),
        ("load", "digits"),
        atomic=True,
    )(
        inputs=[q_idx, memory.k_idx, *paged],
        template=[
            ("T", memory.k_idx.dtype), ("I", index_dim), ("V", 4 if index_dim % 4 == 0 else 1),
            ("P", PAGE_SIZE), ("KEYS", _KEYS), ("THREADS", threads),
        ],
        grid=(-(-length // _KEYS) * threads, num_queries, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(num_queries, _TOP_BINS + length)],
        output_dtypes=[mx.uint32],
        init_value=0,
    )  # fmt: skip
    candidates, counts = load(
        "select_candidates", ("work", "positions", "k"), ("candidates", "counts"), ("digits",)
    )(
        inputs=[work, queries.positions, k],
        template=[("THREADS", threads)],
        output_shapes=[(num_queries, length), (num_queries, num_blocks, 2)],
        **blocks_grid,
        **counts_form,
    )  # fmt: skip
    threshold, reached = load(
        "select_threshold", ("work", "candidates", "counts", "positions", "k"), ("threshold", "reached"), ("digits",)
    )(
        inputs=[work, candidates, counts, queries.positions, k],
        template=[("BLOCK", 4 * threads), ("THREADS", threads)],
        grid=(threads * num_queries, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(num_queries, 2), (num_queries, num_blocks, 2)],
        **counts_form,
    )
    positions, rows, lengths = load(
        "select_write",
        ("work", "threshold", "reached", "positions", "sequence", "block_table", "k"),
        ("chosen", "rows", "lengths"),
        ("digits",),
    )(
        inputs=[work, threshold, reached, *paged, k],
        template=[("P", PAGE_SIZE), ("THREADS", threads)],
        output_shapes=[(num_queries, k), (num_queries, k), (num_queries,)],
        output_dtypes=[mx.int32, mx.int32, mx.int32],
        **blocks_grid,
    )
    return Selection(positions, rows, lengths)
