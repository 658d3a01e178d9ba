"""Look inside a model: logits and selections of every position of a text, through the ordinary step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clsa.batch import SequenceChunk, build_batch
from clsa.config import PAGE_SIZE
from clsa.errors import RequestError
from clsa.model import Params, forward, new_state
from clsa.ops import Array, Ops, Selection
from clsa.plan import Plan

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


def evaluate_logits(ops: Ops, params: Params, plan: Plan, dtype: str, tokens: Sequence[int]) -> np.ndarray:
    """float32 [T, V], every position, the selection applied per position."""
    chunks = [ops.to_numpy(logits) for logits in _walk(ops, params, plan, dtype, tokens)]
    return np.concatenate(chunks).astype(np.float32)


def evaluate_selection(
    ops: Ops, params: Params, plan: Plan, dtype: str, tokens: Sequence[int], layer: int | None
) -> np.ndarray:
    """int32 [T, index_topk]: ascending positions, -1 padded, of one layer that computes an index."""
    routing = [i for i, planned in enumerate(plan.layers) if planned.route == "F"]
    if not routing or (layer is not None and layer not in routing):
        raise RequestError(
            f"layer must be one that computes an index ({routing or 'this model has none'}), got {layer}"
        )
    which = 0 if layer is None else routing.index(layer)
    recorder = RecordingOps(ops)
    chunks = []
    for _ in _walk(recorder, params, plan, dtype, tokens):
        chunks.append(ops.to_numpy(recorder.selections[which].positions))
        recorder.selections.clear()
    return np.concatenate(chunks).astype(np.int32)


def _walk(ops: Ops, params: Params, plan: Plan, dtype: str, tokens: Sequence[int]) -> Iterator[Array]:
    limit = plan.config.max_position_embeddings
    if len(tokens) > limit:
        raise RequestError(f"the text has {len(tokens)} tokens and the model takes at most {limit}; shorten it")
    num_pages = -(-len(tokens) // PAGE_SIZE)
    state = new_state(ops, plan, num_pages * PAGE_SIZE, 1, dtype)
    for start in range(0, len(tokens), CHUNK):
        chunk = SequenceChunk(tokens[start : start + CHUNK], start, range(num_pages), 0, "all")
        logits, state = forward(ops, params, plan, build_batch(ops, [chunk], plan.config.sliding_window), state)
        yield logits
