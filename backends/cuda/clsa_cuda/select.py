"""Routing: paged scores and the exact, deterministic top-k (paper, equations 1-3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries, Selection
from clsa_cuda.attention import MAX_QUERIES, block_length
from clsa_cuda.state import page_rows, zero_row

_LOWEST = torch.iinfo(torch.int64).min  # below the key of every score
_LOW_BITS = (1 << 32) - 1


def select(q_idx: Tensor, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
    assert memory.k_idx is not None
    if queries.one_each:
        # The width of the table, not the context lengths: it does not change from step to step.
        table = queries.block_table[queries.sequence.long()]
        scores = _scores(q_idx[:, None], memory.k_idx, table, queries.positions, table.shape[1] * PAGE_SIZE)
        positions = best_positions(scores[:, 0], queries.positions, k, block_size)
    else:
        positions = _select_per_sequence(q_idx, memory.k_idx, queries, k, block_size)
        table = queries.block_table[queries.sequence.long()]
    rows = page_rows(table, positions, positions >= 0, -1).int()
    return Selection(positions, rows, (positions >= 0).sum(1, dtype=torch.int32))


def take_selection(selection: Selection, rows: Tensor) -> Selection:
    fields = (selection.positions, selection.rows, selection.lengths)
    return Selection(*(field.index_select(0, rows) for field in fields))


def ordered_keys(scores: Tensor) -> Tensor:
    """Distinct int64 keys in the order of scores [..., S] without NaN; equal scores fall with the position."""
    scores = scores.float() + 0.0  # -0.0 becomes 0.0
    bits = scores.view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # floats of both signs, in integer order
    inverted = _LOW_BITS - torch.arange(scores.shape[-1], device=scores.device)
    return (bits.long() << 32) | inverted


def key_positions(keys: Tensor) -> Tensor:
    """The positions that keys stand for."""
    return _LOW_BITS - (keys & _LOW_BITS)


def best_positions(scores: Tensor, last: Tensor, k: int, block_size: int) -> Tensor:
    """Of what each query sees, the k best: scores [T, S], last visible position [T] -> [T, k] int32 ascending."""
    last = last[:, None]
    visible = torch.arange(scores.shape[1], device=scores.device) <= last
    scores = torch.where(visible & ~scores.isnan(), scores, -torch.inf)
    if block_size > 1:
        scores = F.pad(scores, (0, -scores.shape[1] % block_size), value=-torch.inf)
        scores = scores.unflatten(1, (-1, block_size)).amax(2)
    num_blocks = scores.shape[1]
    starts = torch.arange(num_blocks, device=scores.device) * block_size
    keys = ordered_keys(scores).masked_fill(starts > last, _LOWEST)
    best = keys.topk(min(k // block_size, num_blocks), dim=1, sorted=False).values
    blocks = torch.where(best == _LOWEST, num_blocks, key_positions(best)).sort(dim=1).values
    offsets = torch.arange(block_size, device=scores.device)
    positions = (blocks[..., None] * block_size + offsets).flatten(1)
    positions = torch.where(positions <= last, positions, -1).int()
    return F.pad(positions, (0, k - positions.shape[1]), value=-1)


def _select_per_sequence(q_idx: Tensor, k_idx: Tensor, queries: Queries, k: int, block_size: int) -> Tensor:
    out = torch.full((q_idx.shape[0], k), -1, dtype=torch.int32, device=q_idx.device)
    bounds = zip(queries.cu_seqlens, queries.cu_seqlens[1:], queries.context_lens, strict=False)
    for b, (first, last, context_len) in enumerate(bounds):
        table = queries.block_table[b : b + 1]
        size = block_length(8 * context_len, MAX_QUERIES)  # the keys are int64
        for start in range(first, last if context_len else first, size):
            rows = slice(start, min(start + size, last))
            positions = queries.positions[rows]
            scores = _scores(q_idx[None, rows], k_idx, table, positions.amax()[None], context_len)
            out[rows] = best_positions(scores[0], positions, k, block_size)
    return out


def _scores(q_idx: Tensor, k_idx: Tensor, table: Tensor, last: Tensor, context_len: int) -> Tensor:
    """q_idx [n, Q, I] . K_idx of positions 0 to last [n] of each sequence: [n, Q, context_len] float32."""
    n, _, index_dim = q_idx.shape
    wide = q_idx.float()
    size = block_length(4 * n * index_dim, max(1, context_len))
    parts = []
    for start in range(0, context_len, size):
        keys = torch.arange(start, min(start + size, context_len), device=table.device)
        rows = page_rows(table, keys, keys <= last[:, None], zero_row(k_idx))
        parts.append(wide @ k_idx[rows].float().mT)
    return torch.cat(parts, dim=2)
