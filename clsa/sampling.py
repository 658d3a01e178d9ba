"""Sampling parameters of many requests as the arrays of one `ops.sample` call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clsa.config import SamplingParams
from clsa.ops import Array, Ops, SamplingBatch


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row to sample: `position` is where its token will stand, `seen` the tokens of prompt and answer so far.

    `pending`: the newest of those tokens is not on the host yet; it is row `pending` of the previous sample.
    """

    params: SamplingParams
    position: int
    seen: Sequence[int]
    pending: int | None = None


def build_sampling(ops: Ops, rows: Sequence[SamplingRow], previous: Array | None) -> SamplingBatch:
    """Args: `previous` [n] int32 are the tokens of the step before, needed where a row is pending."""
    params = [row.params for row in rows]

    def floats(values: Sequence[float]) -> Array:
        return ops.asarray(np.array(values, np.float32))

    def ints(values: Sequence[int]) -> Array:
        return ops.asarray(np.array(values, np.int32))

    logprobs = [p.logprobs for p in params if p.logprobs is not None]
    seeds = np.array([[p.seed & 0xFFFFFFFF, p.seed >> 32] for p in params], np.uint32)
    return SamplingBatch(
        temperature=floats([p.temperature for p in params]),
        top_k=ints([p.top_k for p in params]),
        top_p=floats([p.top_p for p in params]),
        min_p=floats([p.min_p for p in params]),
        repetition_penalty=floats([p.repetition_penalty for p in params]),
        seed=ops.asarray(seeds),
        positions=ints([row.position for row in rows]),
        penalty_tokens=_penalty_tokens(ops, rows, previous),
        num_logprobs=max(logprobs) if logprobs else None,
        all_greedy=all(p.temperature == 0 for p in params),
        any_filter=any(p.top_k or p.top_p < 1 or p.min_p for p in params),
    )


def _penalty_tokens(ops: Ops, rows: Sequence[SamplingRow], previous: Array | None) -> Array | None:
    """Tokens seen so far [R, n], -1 padded; None if nobody asked for a penalty."""
    seen = [set(row.seen) if row.params.repetition_penalty != 1 else set() for row in rows]
    if not any(seen):
        return None
    # Each distinct token once, in columns of a power of two so that shapes repeat; one more for the pending token.
    width = 1 << max(len(s) for s in seen).bit_length()
    table = np.full((len(rows), width + 1), -1, np.int32)
    for r, tokens in enumerate(seen):
        table[r, : len(tokens)] = sorted(tokens)
    if previous is None:
        return ops.asarray(table)
    source = np.arange(table.size).reshape(table.shape)
    for r, row in enumerate(rows):
        if row.pending is not None and seen[r]:
            source[r, -1] = table.size + row.pending
    flat = ops.concat([ops.asarray(table.reshape(-1)), previous])
    return ops.take(flat, ops.asarray(source.reshape(-1).astype(np.int32))).reshape(*table.shape)
