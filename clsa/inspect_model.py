"""Look inside a model: logits and selections of every position of a text, through the ordinary step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clsa.batch import SequenceChunk, build_batch
from clsa.config import MODEL_DTYPE, PAGE_SIZE, MemoryDtypes, show
from clsa.errors import RequestError
from clsa.hostmemory import host_memory_stats
from clsa.model import Params, forward, new_state
from clsa.ops import Array, Ops, Selection
from clsa.plan import Plan
from clsa.sizing import state_bytes

CHUNK = 512  # positions whose logits and selections are on the device at once


class RecordingOps:
    """An Ops that keeps what `select` returned and otherwise is the one it wraps."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.selections: list[Selection] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def select(self, *args: Any, **kwargs: Any) -> Selection:
        selection = self._ops.select(*args, **kwargs)
        self.selections.append(selection)
        return selection


def evaluate_logits(
    ops: Ops, params: Params, plan: Plan, dtype: str, tokens: Sequence[int], stored: MemoryDtypes = MODEL_DTYPE
) -> np.ndarray:
    """float32 [T, V], every position, the selection applied per position.

    Raises RequestError if the text is longer than the model takes, or the state or the result would not fit.
    """
    out = _result(plan, tokens, plan.config.vocab_size, np.float32)
    for start, logits in _walk(ops, params, plan, dtype, tokens, stored):
        out[start : start + CHUNK] = ops.to_numpy(logits)
    return out


def evaluate_selection(
    ops: Ops,
    params: Params,
    plan: Plan,
    dtype: str,
    tokens: Sequence[int],
    layer: int | None,
    stored: MemoryDtypes = MODEL_DTYPE,
) -> np.ndarray:
    """int32 [T, index_topk]: ascending positions, -1 padded, of one layer that computes an index.

    Raises RequestError as `evaluate_logits` does, and if `layer` computes no index (None: the first that does).
    """
    routing = [i for i, planned in enumerate(plan.layers) if planned.route == "F"]
    if not routing or (layer is not None and layer not in routing):
        raise RequestError(
            f"layer must be one that computes an index ({routing or 'this model has none'}), got {show(layer)}"
        )
    which = 0 if layer is None else routing.index(layer)
    out = _result(plan, tokens, plan.config.index_topk, np.int32)
    recorder = RecordingOps(ops)
    for start, _ in _walk(recorder, params, plan, dtype, tokens, stored):
        out[start : start + CHUNK] = ops.to_numpy(recorder.selections[which].positions)
        recorder.selections.clear()
    return out


def _result(plan: Plan, tokens: Sequence[int], columns: int, dtype: type) -> np.ndarray:
    """One row per token on the host, not written yet."""
    limit = plan.config.max_position_embeddings
    if len(tokens) > limit:
        raise RequestError(f"the text has {len(tokens)} tokens and the model takes at most {limit}; shorten it")
    needed, free = len(tokens) * columns * np.dtype(dtype).itemsize, host_memory_stats()["free"]
    if needed > free:
        raise RequestError(
            f"the result of {len(tokens)} tokens needs {needed:,} bytes and {free:,} are free; shorten the text"
        )
    return np.empty((len(tokens), columns), dtype)


def _walk(
    ops: Ops, params: Params, plan: Plan, dtype: str, tokens: Sequence[int], stored: MemoryDtypes
) -> Iterator[tuple[int, Array]]:
    """The position at which each chunk starts, and its logits [<= CHUNK, V]."""
    num_pages = -(-len(tokens) // PAGE_SIZE)
    needed, free = state_bytes(ops, plan, dtype, num_pages, 1, stored), ops.memory_stats()["free"]
    if needed > free:
        raise RequestError(
            f"the state of {len(tokens)} tokens needs {needed:,} bytes and {free:,} are free on {ops.device}; "
            "shorten the text"
        )
    state = new_state(ops, plan, num_pages * PAGE_SIZE, 1, dtype, stored)
    for start in range(0, len(tokens), CHUNK):
        chunk = SequenceChunk(tokens[start : start + CHUNK], start, range(num_pages), 0, "all")
        logits, state = forward(ops, params, plan, build_batch(ops, [chunk], plan.config.sliding_window), state)
        yield start, logits
