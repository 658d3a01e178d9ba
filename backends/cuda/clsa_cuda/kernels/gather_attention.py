"""`gather_attention`: attention over the selected rows, read where they lie or from a compact copy of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.ops import Memory, Selection
from clsa_cuda.kernels.attend_rows import attend_rows
from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.tiles import AttentionTiles, attention_tiles, cdiv, limits, next_power_of_2


def gather_attention(
    q: Tensor, memory: Memory, selection: Selection, tiles: AttentionTiles | None = None, fresh: bool = True
) -> Tensor:
    """`Ops.gather_attention`; `tiles` is for measuring others. Rows lie before the first -1.

    `fresh` False promises that the last launch made nothing but `q` of this: see `attend_rows`.
    """
    k = selection.rows.shape[1]
    tiles = tiles or _tiles(q, memory.k, k)
    kv = (memory.k, memory.v)
    return attend_rows("list", k, q, kv, None, selection.rows, selection.lengths, tiles, fresh=fresh)


def _tiles(q: Tensor, k: Tensor, max_keys: int) -> AttentionTiles:
    return attention_tiles(q.shape[0], k.shape[1], max_keys, q.shape[2], q.itemsize, limits(q.device))


@dataclass(frozen=True, slots=True)
class CompactRows:
    """Copies of the selected rows, query after query: what layers that share memory and selection can share."""

    k: Tensor  # [T * K, G, D]
    v: Tensor  # [T * K, G, D]
    lengths: Tensor  # [T] int32


@launcher
@triton.jit
def _compact_kernel(
    k,
    v,
    rows,
    lengths,
    k_out,
    v_out,
    k_stride,
    v_stride,
    K,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, block): BLOCK selected rows of query t."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_E)
    row = tl.load(rows + t * K + i, mask=i < tl.load(lengths + t), other=-1).to(tl.int64)
    mask = (row >= 0)[:, None] & (e < E)[None, :]
    to = (t * K + i)[:, None] * E + e[None, :]
    tl.store(k_out + to, tl.load(k + row[:, None] * k_stride + e[None, :], mask=mask), mask=mask)
    tl.store(v_out + to, tl.load(v + row[:, None] * v_stride + e[None, :], mask=mask), mask=mask)


def compact_rows(memory: Memory, selection: Selection) -> CompactRows:
    """Copy the selected rows once. Rows of the copy beyond a query's length stay unwritten, and are not read."""
    num_queries, k = selection.rows.shape
    shape = (num_queries * k, *memory.k.shape[1:])
    copies = [torch.empty(shape, dtype=x.dtype, device=x.device) for x in (memory.k, memory.v)]
    row_size = shape[1] * shape[2]
    block = max(1, min(16, 8192 // next_power_of_2(row_size)))
    if num_queries:
        _compact_kernel[num_queries, cdiv(k, block)](
            memory.k,
            memory.v,
            selection.rows,
            selection.lengths,
            *copies,
            memory.k.stride(0),
            memory.v.stride(0),
            k,
            E=row_size,
            BLOCK_E=next_power_of_2(row_size),
            BLOCK=block,
            num_warps=4,
        )
    return CompactRows(copies[0], copies[1], selection.lengths)


def compact_attention(q: Tensor, compact: CompactRows, tiles: AttentionTiles | None = None) -> Tensor:
    """`gather_attention` of the selection that `compact` was made from."""
    k = compact.k.shape[0] // max(1, q.shape[0])
    tiles = tiles or _tiles(q, compact.k, k)
    return attend_rows("block", k, q, (compact.k, compact.v), None, compact.lengths, compact.lengths, tiles)
