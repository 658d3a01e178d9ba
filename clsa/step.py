"""A step plan of the scheduler as the inputs of one step, in NumPy arrays; and decode steps in repeating shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clsa.batch import SequenceChunk, pack
from clsa.config import PAGE_SIZE
from clsa.ops import Queries, RestInputs, Rows, SamplingBatch, StepBatch, StepInputs
from clsa.request import Request
from clsa.sampling import SamplingRow, pack_sampling
from clsa.step_plan import Chunk, StepPlan


class PageTables:
    """Page lists as arrays, kept while their requests run: a list of thousands is slow to convert in every step.

    The scheduler only ever appends to the list of a running request, and makes a new one when it runs again.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[list[int], np.ndarray, int]] = {}  # id -> the list, its array, how much of it

    def of(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """The page ids of each request, int32. Forgets all other requests."""
        self._known = {request.id: self._extended(request) for request in requests}
        return [array[:count] for _, array, count in self._known.values()]

    def _extended(self, request: Request) -> tuple[list[int], np.ndarray, int]:
        pages = request.pages
        known, array, count = self._known.get(request.id, (None, np.empty(0, np.int32), 0))
        if known is not pages:
            array, count = np.empty(0, np.int32), 0
        if len(pages) > len(array):
            larger = np.empty(2 * len(pages), np.int32)
            larger[:count] = array[:count]
            array = larger
        array[count : len(pages)] = pages[count:]
        return pages, array, len(pages)


def step_inputs(step: StepPlan, window: int, tables: PageTables) -> StepInputs:
    """Args: `window` is the model's sliding window W (any number if it has none)."""
    pages = tables.of([chunk.request for chunk in step.chunks])
    batch = pack([_sequence_chunk(chunk, own) for chunk, own in zip(step.chunks, pages, strict=True)], window)
    rows = [
        SamplingRow(chunk.request.params, chunk.stop, _seen(chunk.request), chunk.pending)
        for chunk in step.chunks
        if chunk.wants_logits
    ]
    sampling, penalty_source = pack_sampling(rows) if rows else (None, None)
    return StepInputs(batch, sampling, _token_source(step, batch), penalty_source)


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


def pad_rest(inputs: StepInputs, max_pages: int) -> tuple[StepInputs, RestInputs] | None:
    """A step with prompts in two parts: up to the prefill exit, and from there on, padded as a decode step is.

    The device gives the second part its rows, one of each sequence that wants logits; padded ones repeat the first.
    None if nothing leaves the first part, or more than one row of a sequence does.
    """
    batch = inputs.batch
    queries, num_rows = batch.logits_queries, 0 if batch.logits_rows is None else len(batch.logits_rows)
    if num_rows == 0 or queries is None or len(np.unique(queries.sequence)) < num_rows:
        return None
    leaving = queries.sequence
    alone = replace(
        queries,
        sequence=np.arange(num_rows, dtype=np.int32),
        block_table=queries.block_table[leaving],
        window_slots=queries.window_slots[leaving],
    )
    padded = _pad_queries(alone, max_pages)
    rows = len(padded.positions)
    sampling, penalty_source = _pad_sampling(inputs, rows)
    assert sampling is not None and batch.logits_rows is not None
    first = replace(batch, logits_rows=_pad(batch.logits_rows, rows, batch.logits_rows[0]), logits_queries=padded)
    rest = RestInputs(Rows(None, padded, None), sampling, penalty_source)
    return StepInputs(first, None, inputs.token_source, None), rest


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


def _sequence_chunk(chunk: Chunk, pages: np.ndarray) -> SequenceChunk:
    request = chunk.request
    tokens = [0] if chunk.pending is not None else request.tokens[chunk.start : chunk.stop]
    return SequenceChunk(tokens, chunk.start, pages, request.window_slot, "last" if chunk.wants_logits else "none")


def _token_source(step: StepPlan, batch: StepBatch) -> np.ndarray | None:
    """Where each token comes from; None if all are known."""
    if all(chunk.pending is None for chunk in step.chunks):
        return None
    source = np.arange(len(batch.tokens), dtype=np.int32)
    for first, chunk in zip(batch.queries.cu_seqlens, step.chunks, strict=False):
        if chunk.pending is not None:
            source[first] = len(source) + chunk.pending
    return source
