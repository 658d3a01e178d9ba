"""From integers to arrays: the one place where a step's lists become a StepBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from clsa.config import PAGE_SIZE
from clsa.ops import Array, Ops, Queries, StepBatch, map_arrays

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """Some consecutive tokens of one sequence: `tokens[i]` stands at position `start + i`."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int] | np.ndarray  # page ids of the sequence, covering at least start + len(tokens) positions
    window_slot: int
    logits: Literal["none", "last", "all"]


def build_batch(ops: Ops, chunks: Sequence[SequenceChunk], window: int, tokens: Array | None = None) -> StepBatch:
    """Pack chunks into one step, on the device.

    Args: `window` is the model's sliding window W (any number if it has none). `tokens` [T] int32 replaces
    the chunks' tokens where they are on the device already.
    """
    batch = upload(ops, pack(chunks, window))
    return batch if tokens is None else replace(batch, tokens=tokens)


def pack(chunks: Sequence[SequenceChunk], window: int) -> StepBatch:
    """Pack chunks into one step, in NumPy arrays."""
    lengths = np.array([len(c.tokens) for c in chunks])
    cu_seqlens = (0, *np.cumsum(lengths).tolist())
    return lay_out(
        tokens=np.concatenate([np.asarray(c.tokens, np.int32) for c in chunks]),
        starts=np.array([c.start for c in chunks]),
        lengths=lengths,
        table=_block_table(chunks),
        slots=np.array([c.window_slot for c in chunks], np.int32),
        wanted=_wanted_rows(chunks, cu_seqlens),
        window=window,
    )


def lay_out(
    tokens: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    table: np.ndarray,
    slots: np.ndarray,
    wanted: np.ndarray,
    window: int,
) -> StepBatch:
    """A step in NumPy arrays from what its B sequences bring.

    Args: `tokens` [T] int32, sequence after sequence; the position `starts` [B] of each one's first and how many they
    are, `lengths` [B]; its page ids `table` [B, M] int32; its window `slots` [B] int32; `wanted` [R] int32, the tokens
    whose logits are wanted; `window` as for `build_batch`.
    """
    stops = np.cumsum(lengths)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    offsets = np.arange(len(tokens)) - (stops - lengths)[sequence]  # of a token in its chunk
    positions = starts[sequence] + offsets
    slot_mapping = table[sequence, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    ring = slots[sequence] * window + positions % window
    is_kept = offsets >= (lengths - window)[sequence]  # an older token would share a row with a newer one
    queries = Queries(
        positions.astype(np.int32),
        sequence.astype(np.int32),
        table,
        slots,
        (0, *stops.tolist()),
        tuple((starts + lengths).tolist()),
    )
    all_wanted = len(wanted) == len(tokens)
    return StepBatch(
        tokens=tokens,
        queries=queries,
        slot_mapping=slot_mapping.astype(np.int32),
        ring_mapping=np.where(is_kept, ring, -1).astype(np.int32),
        logits_rows=None if all_wanted else wanted,
        logits_queries=None if all_wanted else _subset(queries, wanted),
    )


def upload(ops: Ops, value: Value) -> Value:
    """A value (dataclasses of NumPy arrays) with its arrays on the device, each of them moved once."""
    arrays: dict[int, np.ndarray] = {}
    map_arrays(value, lambda x: arrays.setdefault(id(x), x))
    moved = dict(zip(arrays, ops.asarrays(list(arrays.values())), strict=True))
    result: Value = map_arrays(value, lambda x: moved[id(x)])
    return result


def _subset(queries: Queries, rows: np.ndarray) -> Queries:
    counts = np.bincount(queries.sequence[rows], minlength=len(queries.context_lens))
    return replace(
        queries,
        positions=queries.positions[rows],
        sequence=queries.sequence[rows],
        cu_seqlens=(0, *np.cumsum(counts).tolist()),
    )


def _block_table(chunks: Sequence[SequenceChunk]) -> np.ndarray:
    """Page ids [B, M] int32, -1 beyond the pages that the chunk's last position needs."""
    needed = [-(-(c.start + len(c.tokens)) // PAGE_SIZE) for c in chunks]
    table = np.full((len(chunks), max(needed)), -1, np.int32)
    for b, (chunk, count) in enumerate(zip(chunks, needed, strict=True)):
        table[b, :count] = chunk.pages[:count]
    return table


def _wanted_rows(chunks: Sequence[SequenceChunk], cu_seqlens: tuple[int, ...]) -> np.ndarray:
    rows: list[int] = []
    for chunk, start, stop in zip(chunks, cu_seqlens, cu_seqlens[1:], strict=False):
        first = {"none": stop, "last": stop - 1, "all": start}[chunk.logits]
        rows.extend(range(first, stop))
    return np.array(rows, np.int32)
