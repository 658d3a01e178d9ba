"""Memories, windows, and the rows behind them: see `clsa.ops.Ops` for shapes and meaning.

Every K, V, K_idx and ring tensor ends with one page of rows of its own. The first of them stays zero: it is read in
place of -1 and of everything a query must not see, so that a masked weight of 0 never meets a NaN. The last one takes
what is written to -1, so that a write needs neither a mask nor a host decision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Window
from clsa_cuda.plain import FLOAT8, to_float8

SPARE_ROWS = PAGE_SIZE


def zero_row(tensor: Tensor) -> int:
    """The row that is always zero."""
    return tensor.shape[0] - SPARE_ROWS


def empty_rows(rows: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(rows + SPARE_ROWS, *shape, dtype=dtype, device=device)


def page_rows(block_table: Tensor, positions: Tensor, seen: Tensor, hidden: int) -> Tensor:
    """Physical rows of positions: [n, M] and [S] or [n, S] -> [n, S] int64; `hidden` where `seen` [n, S] is False."""
    positions = positions.expand_as(seen).long()
    pages = block_table.long().gather(1, torch.where(seen, positions // PAGE_SIZE, 0))
    return torch.where(seen, pages * PAGE_SIZE + positions % PAGE_SIZE, hidden)


def _write(target: Tensor, values: Tensor, mapping: Tensor) -> None:
    rows = torch.where(mapping < 0, target.shape[0] - 1, mapping.long())
    if target.dtype == FLOAT8:
        target.view(torch.uint8).index_copy_(0, rows, to_float8(values).view(torch.uint8))
    else:
        target.index_copy_(0, rows, values.to(target.dtype))


def write_memory(memory: Memory, k: Tensor, v: Tensor, k_idx: Tensor | None, slot_mapping: Tensor) -> Memory:
    _write(memory.k, k, slot_mapping)
    _write(memory.v, v, slot_mapping)
    if memory.k_idx is not None and k_idx is not None:
        _write(memory.k_idx, k_idx, slot_mapping)
    return memory


def write_window(window: Window, k: Tensor, v: Tensor, ring_mapping: Tensor) -> Window:
    _write(window.k, k, ring_mapping)
    _write(window.v, v, ring_mapping)
    return window


def copy_window(window: Window, source: Tensor, target: Tensor) -> Window:
    for ring in (window.k, window.v):
        slots = ring[:-SPARE_ROWS].unflatten(0, (-1, window.size))
        slots.index_copy_(0, target.long(), slots.index_select(0, source))
    return window
