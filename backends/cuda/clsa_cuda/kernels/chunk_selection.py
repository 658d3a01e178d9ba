"""Selections of whole chunks: where many queries of a sequence ask, and what is there to choose from is not much.

Reading each query's rows one by one moves K and V as often as they are chosen. Tiles of queries that read all keys and
leave out what is not chosen move them once for a tile: that is less while contexts are a small multiple of index_topk.
(Figures: docs/log.md, 2026-11-29.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Queries, Selection
from clsa_cuda.attention import MAX_TEMPORARY_BYTES
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.tiles import next_power_of_2

_TIMES = 12  # contexts, in tokens of the page table, as a multiple of index_topk
_TOKENS_EACH = 16  # of a sequence, on average: its last tile is not full


@dataclass(frozen=True, slots=True)
class ChunkSelection(Selection):
    """A selection, who asked, and whether query t reads position i: marks [T, tokens of the page table] int8.

    No marks where as much is chosen as there can be: then everything that a query sees.
    """

    queries: Queries
    marks: Tensor | None


@launcher
@triton.jit
def _mark_kernel(positions, marks, capacity, K, BLOCK_K: tl.constexpr):
    """Program (t): marks of query t."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_K)
    position = tl.load(positions + t * K + i, mask=i < K, other=-1)
    tl.store(marks + t * capacity + position, tl.full([BLOCK_K], 1, tl.int8), mask=position >= 0)


def with_marks(selection: Selection, queries: Queries) -> Selection:
    """The selection of these queries, as a `ChunkSelection` where reading all keys takes less."""
    num_queries, k = selection.positions.shape
    capacity = queries.block_table.shape[1] * PAGE_SIZE
    fits = capacity <= _TIMES * k and num_queries * capacity <= MAX_TEMPORARY_BYTES
    if not fits or num_queries < _TOKENS_EACH * (len(queries.cu_seqlens) - 1):
        return selection
    marks = None
    if k < capacity:
        marks = torch.zeros(num_queries, capacity, dtype=torch.int8, device=selection.positions.device)
        _mark_kernel[(num_queries,)](selection.positions, marks, capacity, k, BLOCK_K=next_power_of_2(k), num_warps=4)
    return ChunkSelection(selection.positions, selection.rows, selection.lengths, queries, marks)
