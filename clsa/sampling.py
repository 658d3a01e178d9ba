"""Sampling parameters of many requests as the arrays of one `ops.sample` call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clsa.config import SamplingParams
from clsa.ops import Array, Ops, SamplingBatch


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row to sample: `position` is where its token will stand, `seen` the distinct tokens of prompt and answer.

    `seen` is needed only with a penalty. `pending`: the newest token is not on the host yet; it is row `pending` of the
    previous sample.
    """

    params: SamplingParams
    position: int
    seen: Sequence[int]
    pending: int | None = None


def pack_sampling(rows: Sequence[SamplingRow]) -> tuple[SamplingBatch, np.ndarray | None]:
    """The rows in NumPy arrays, and the `penalty_source` of `StepInputs`."""
    params = [row.params for row in rows]
    logprobs = [p.logprobs for p in params if p.logprobs is not None]
    penalty_tokens, penalty_source = _penalty_tokens(rows)
    seeds = np.array([p.seed for p in params], np.uint64)
    batch = SamplingBatch(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        repetition_penalty=np.array([p.repetition_penalty for p in params], np.float32),
        seed=np.stack([seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)], axis=1).astype(np.uint32),
        positions=np.array([row.position for row in rows], np.int32),
        penalty_tokens=penalty_tokens,
        num_logprobs=max(logprobs) if logprobs else None,
        all_greedy=all(p.temperature == 0 for p in params),
        any_filter=any(p.top_k or p.top_p < 1 or p.min_p for p in params),
    )
    return batch, penalty_source


def _penalty_tokens(rows: Sequence[SamplingRow]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Tokens seen so far [R, n], -1 padded, and where each comes from; None if nobody asked for a penalty."""
    seen = [row.seen if row.params.repetition_penalty != 1 else () for row in rows]
    if not any(seen):
        return None, None
    # Columns of a power of two, so that shapes repeat; one more for the pending token.
    width = 1 << max(len(s) for s in seen).bit_length()
    table = np.full((len(rows), width + 1), -1, np.int32)
    source = np.arange(table.size, dtype=np.int32).reshape(table.shape)
    for r, tokens in enumerate(seen):
        table[r, : len(tokens)] = tokens
        if (pending := rows[r].pending) is not None and tokens:
            source[r, -1] = table.size + pending
    return table, source.reshape(-1)


def resolve(ops: Ops, tokens: Array, source: Array | None, previous: Array | None) -> Array:
    """Tokens, with those filled in that were still on the device. See `StepInputs`."""
    if source is None or previous is None:
        return tokens
    return ops.take(tokens.reshape(-1), source, previous).reshape(*tokens.shape)
