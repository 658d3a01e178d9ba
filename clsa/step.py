"""A step plan of the scheduler as the inputs of one step, in NumPy arrays; and decode steps in repeating shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clsa.batch import lay_out
from clsa.config import PAGE_SIZE
from clsa.ops import Queries, SamplingBatch, StepBatch, StepInputs
from clsa.request import Request
from clsa.sampling import SamplingRow, pack_sampling
from clsa.step_plan import StepPlan


class _PageList:
    """The pages of a request, and the row of the table that has them."""

    def __init__(self, pages: list[int], row: int) -> None:
        self.pages, self.count, self.row = pages, 0, row


class PageTables:
    """Page lists as rows of a table, kept while their requests run: lists are slow to convert in every step.

    The scheduler only ever appends to the list of a running request, and makes a new one when it runs again.
    """

    def __init__(self) -> None:
        self._known: dict[str, _PageList] = {}  # by request id
        self._table = np.empty((0, 1), np.int32)
        self._free: list[int] = []

    def of(self, requests: Sequence[Request], needed: np.ndarray) -> np.ndarray:
        """Page ids [B, M] int32: `needed` [B] of each request, -1 behind them. Forgets all other requests."""
        rows = [self._row(request) for request in requests]
        if len(self._known) > len(requests):
            for name in self._known.keys() - {request.id for request in requests}:
                self._free.append(self._known.pop(name).row)
        table = self._table[rows, : needed.max()]
        table[np.arange(table.shape[1]) >= needed[:, None]] = -1
        return table

    def _row(self, request: Request) -> int:
        pages = request.pages
        known = self._known.get(request.id)
        if known is None:
            if not self._free:
                self._enlarge(rows=max(8, len(self._table)))
            known = self._known[request.id] = _PageList(pages, self._free.pop())
        elif known.pages is pages and known.count == len(pages):
            return known.row
        if known.pages is not pages:
            known.pages, known.count = pages, 0
        if len(pages) > self._table.shape[1]:
            self._enlarge(columns=len(pages))
        self._table[known.row, known.count : len(pages)] = pages[known.count :]
        known.count = len(pages)
        return known.row

    def _enlarge(self, rows: int = 0, columns: int = 0) -> None:
        self._free += range(len(self._table), len(self._table) + rows)
        self._table = np.pad(self._table, [(0, rows), (0, columns)])


def step_inputs(step: StepPlan, window: int, tables: PageTables) -> StepInputs:
    """Args: `window` is the model's sliding window W (any number if it has none)."""
    requests, *columns, pending = zip(*step.chunks, strict=True)
    starts, stops, wants = (np.array(column) for column in columns)
    lengths = stops - starts
    batch = lay_out(
        tokens=np.array(_tokens(step), np.int32),
        starts=starts,
        lengths=lengths,
        table=tables.of(requests, -(-stops // PAGE_SIZE)),
        slots=np.array([request.window_slot for request in requests], np.int32),
        wanted=(np.cumsum(lengths)[wants] - 1).astype(np.int32),
        window=window,
    )
    rows = [
        SamplingRow(chunk.request.params, chunk.stop, _seen(chunk.request), chunk.pending)
        for chunk in step.chunks
        if chunk.wants_logits
    ]
    sampling, penalty_source = pack_sampling(rows) if rows else (None, None)
    return StepInputs(batch, sampling, _token_source(pending, batch), penalty_source)


def _tokens(step: StepPlan) -> list[int]:
    """All of them; 0 for those that are not read back yet."""
    tokens: list[int] = []
    for request, start, stop, _, pending in step.chunks:
        if pending is not None:
            tokens.append(0)
        else:
            tokens += request.tokens[start:stop]
    return tokens


def _seen(request: Request) -> Sequence[int]:
    return request.distinct_tokens() if request.params.repetition_penalty != 1 else ()


def pad_decode(inputs: StepInputs, max_pages: int) -> StepInputs:
    """The same decode step with rows padded to a bucket and page tables to a power of two, so that few shapes occur.

    A padded row stands at position -1, sees nothing and writes nothing. `max_pages` bounds the page tables.
    """
    batch, num_rows = inputs.batch, len(inputs.batch.tokens)
    rows = bucket(num_rows)
    source = inputs.token_source
    tokens = np.arange(rows, dtype=np.int32)
    if source is not None:  # what came after the tokens now comes after the padded ones
        tokens[:num_rows] = np.where(source < num_rows, source, source + rows - num_rows)
    sampling, penalty_source = _pad_sampling(inputs, rows)
    return StepInputs(
        replace(
            batch,
            tokens=_pad(batch.tokens, rows, 0),
            queries=_pad_queries(batch.queries, max_pages),
            slot_mapping=_pad(batch.slot_mapping, rows, -1),
            ring_mapping=_pad(batch.ring_mapping, rows, -1),
        ),
        sampling,
        tokens,
        penalty_source,
    )


def pad_rest(inputs: StepInputs, max_pages: int) -> StepInputs | None:
    """The same step with what follows the prefill exit padded, as `pad_decode` pads a decode step.

    Its `logits_queries` are then those of a decode step, one of each sequence that wants logits; padded rows repeat the
    first. None if no row is left behind the exit, or more than one of a sequence.
    """
    batch = inputs.batch
    rows, queries = batch.logits_rows, batch.logits_queries
    if rows is None or queries is None or not 0 < len(rows) == len(np.unique(queries.sequence)):
        return None
    leaving = queries.sequence
    alone = replace(queries, block_table=queries.block_table[leaving], window_slots=queries.window_slots[leaving])
    padded = _pad_queries(alone, max_pages)
    num_rows = len(padded.positions)
    sampling, penalty_source = _pad_sampling(inputs, num_rows)
    batch = replace(batch, logits_rows=_pad(rows, num_rows, rows[0]), logits_queries=padded)
    return StepInputs(batch, sampling, inputs.token_source, penalty_source)


def _pad_queries(queries: Queries, max_pages: int) -> Queries:
    """Of one row of each sequence."""
    num_rows, num_pages = queries.block_table.shape
    rows, pages = bucket(num_rows), min(_power_of_two(num_pages), max_pages)
    table = np.full((rows, pages), -1, np.int32)
    table[:num_rows, :num_pages] = queries.block_table
    return replace(
        queries,
        positions=_pad(queries.positions, rows, -1),
        sequence=np.arange(rows, dtype=np.int32),
        block_table=table,
        window_slots=_pad(queries.window_slots, rows, 0),
        cu_seqlens=tuple(range(rows + 1)),
        context_lens=(pages * PAGE_SIZE,) * rows,
    )


def _pad_sampling(inputs: StepInputs, rows: int) -> tuple[SamplingBatch | None, np.ndarray | None]:
    sampling, source = inputs.sampling, inputs.penalty_source
    if sampling is None:
        return None, None
    penalty_tokens = sampling.penalty_tokens
    if penalty_tokens is not None and source is not None:
        added = (rows - len(penalty_tokens)) * penalty_tokens.shape[1]
        size = penalty_tokens.size
        source = np.where(source < size, source, source + added)
        source = np.concatenate([source, np.arange(size, size + added)]).astype(np.int32)
        penalty_tokens = _pad(penalty_tokens, rows, -1)
    padded = replace(
        sampling,
        temperature=_pad(sampling.temperature, rows, 0),
        top_k=_pad(sampling.top_k, rows, 0),
        top_p=_pad(sampling.top_p, rows, 1),
        min_p=_pad(sampling.min_p, rows, 0),
        repetition_penalty=_pad(sampling.repetition_penalty, rows, 1),
        seed=_pad(sampling.seed, rows, 0),
        positions=_pad(sampling.positions, rows, 0),
        penalty_tokens=penalty_tokens,
    )
    return padded, source


def _pad(x: np.ndarray, rows: int, value: int) -> np.ndarray:
    padded = np.full((rows, *x.shape[1:]), value, x.dtype)
    padded[: len(x)] = x
    return padded


def bucket(rows: int) -> int:
    """Powers of two up to 32, then four sizes for each doubling: what is computed for nobody stays below a fifth."""
    step = max(1, _power_of_two(rows) // 8) if rows > 32 else _power_of_two(rows)
    return -(-rows // step) * step


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _token_source(pending: Sequence[int | None], batch: StepBatch) -> np.ndarray | None:
    """Where each token comes from; None if all are known."""
    if all(row is None for row in pending):
        return None
    source = np.arange(len(batch.tokens), dtype=np.int32)
    for first, row in zip(batch.queries.cu_seqlens, pending, strict=False):
        if row is not None:
            source[first] = len(source) + row
    return source
