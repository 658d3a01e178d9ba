"""From integers to arrays: the one place where a step's lists become a StepBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clsa.config import PAGE_SIZE
from clsa.ops import Array, Ops, Queries, StepBatch


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """Some consecutive tokens of one sequence: `tokens[i]` stands at position `start + i`."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]  # page ids of the sequence, covering at least start + len(tokens) positions
    window_slot: int
    logits: Literal["none", "last", "all"]


def build_batch(ops: Ops, chunks: Sequence[SequenceChunk], window: int, tokens: Array | None = None) -> StepBatch:
    """Pack chunks into one step.

    Args: `window` is the model's sliding window W (any number if it has none). `tokens` [T] int32 replaces
    the chunks' tokens where they are on the device already.
    """
    lengths = [len(c.tokens) for c in chunks]
    starts = np.array([c.start for c in chunks], np.int64)
    cu_seqlens = (0, *np.cumsum(lengths).tolist())
    sequence = np.repeat(np.arange(len(chunks)), lengths)
    offsets = np.arange(cu_seqlens[-1]) - np.array(cu_seqlens)[sequence]  # of a token in its chunk
    positions = starts[sequence] + offsets
    table = _block_table(chunks, lengths)
    slots = np.array([c.window_slot for c in chunks])
    slot_mapping = table[sequence, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    ring = slots[sequence] * window + positions % window
    is_kept = offsets >= np.array(lengths)[sequence] - window  # an older token would share a row with a newer one
    ring_mapping = np.where(is_kept, ring, -1)

    def int32(x: np.ndarray) -> Array:
        return ops.asarray(x.astype(np.int32))

    def queries(rows: np.ndarray) -> Queries:
        counts = np.bincount(sequence[rows], minlength=len(chunks))
        highest = [int(positions[end - 1]) + 1 for end in cu_seqlens[1:]]
        return Queries(
            int32(positions[rows]),
            int32(sequence[rows]),
            int32(table),
            int32(slots),
            (0, *np.cumsum(counts).tolist()),
            tuple(highest),
        )

    every = np.arange(cu_seqlens[-1])
    wanted = _wanted_rows(chunks, cu_seqlens)
    all_wanted = len(wanted) == len(every)
    return StepBatch(
        tokens=int32(np.concatenate([np.asarray(c.tokens) for c in chunks])) if tokens is None else tokens,
        queries=queries(every),
        slot_mapping=int32(slot_mapping),
        ring_mapping=int32(ring_mapping),
        logits_rows=None if all_wanted else int32(wanted),
        logits_queries=None if all_wanted else queries(wanted),
    )


def _block_table(chunks: Sequence[SequenceChunk], lengths: Sequence[int]) -> np.ndarray:
    """Page ids [B, M], -1 beyond the pages that the chunk's last position needs."""
    needed = [-(-(c.start + n) // PAGE_SIZE) for c, n in zip(chunks, lengths, strict=True)]
    table = np.full((len(chunks), max(needed)), -1, np.int64)
    for b, (chunk, count) in enumerate(zip(chunks, needed, strict=True)):
        table[b, :count] = chunk.pages[:count]
    return table


def _wanted_rows(chunks: Sequence[SequenceChunk], cu_seqlens: tuple[int, ...]) -> np.ndarray:
    rows: list[int] = []
    for chunk, start, stop in zip(chunks, cu_seqlens, cu_seqlens[1:], strict=False):
        first = {"none": stop, "last": stop - 1, "all": start}[chunk.logits]
        rows.extend(range(first, stop))
    return np.array(rows, np.int64)
