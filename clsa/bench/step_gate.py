"""Is a whole step right? The few layers that make up a plan, against the specification, through prefill and decode.

The layers have their real width, heads, window and k. The state is random and longer than k, two sequences lie at
random pages, and the weights are random. Each selection is held against the scores that it was made from; then the
specification takes the same selections, as scores closer than rounding may be chosen either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from clsa import spec
from clsa.batch import SequenceChunk, build_batch
from clsa.bench.gates import difference, host_weight, select_gate
from clsa.bench.random_arrays import random_params
from clsa.config import MODEL_DTYPE, PAGE_SIZE, MemoryDtypes, ModelConfig
from clsa.model import forward, new_state
from clsa.ops import Array, Memory, Ops, Queries, Selection, State
from clsa.plan import Plan, make_plan

ROUNDINGS = 4  # times the rounding of one op that the logits of a few layers may be off
MAX_VOCAB = 512
_BEYOND = (200, 77)  # tokens of each sequence beyond k
_CHUNKS = (37, 5)  # tokens of each that are prefilled before the decode step


def step_gate(
    ops: Ops,
    config: ModelConfig,
    dtype: str,
    stored: MemoryDtypes = MODEL_DTYPE,
    weight_dtype: str | None = None,
) -> str | None:
    """What is wrong with a prefill step and a decode step of this plan on this device; None if nothing is."""
    small = few_layers(config)
    plan, rng = make_plan(small), np.random.default_rng(9)
    contexts = [small.index_topk + beyond for beyond in _BEYOND]
    each = -(-(max(contexts) + max(_CHUNKS) + 1) // PAGE_SIZE)
    tables = rng.permutation(len(contexts) * each).reshape(len(contexts), each).tolist()
    params = random_params(ops, small, dtype, weight_dtype)
    exact_params = _on_host(ops, params)
    state, exact_state = _states(ops, plan, len(contexts) * each * PAGE_SIZE, dtype, stored, rng)
    for lengths, where in ((_CHUNKS, "prefill"), ((1, 1), "decode")):
        chunks = [
            SequenceChunk(rng.integers(0, small.vocab_size, n).tolist(), start, table, b, "last")
            for b, (n, start, table) in enumerate(zip(lengths, contexts, tables, strict=True))
        ]
        contexts = [start + n for start, n in zip(contexts, lengths, strict=True)]
        checked = _Checked(ops)
        batch = build_batch(ops, chunks, small.sliding_window)
        logits, state = forward(cast(Ops, checked), params, plan, batch, state)
        exact = build_batch(spec.backend.open(None), chunks, small.sliding_window)
        want, exact_state = forward(_choosing(checked.selections), exact_params, plan, exact, exact_state)
        got, want = ops.to_numpy(logits), spec.to_numpy(want)
        wrong = checked.wrong or difference(got, want, dtype, ROUNDINGS)
        if wrong:
            return f"{where}: {wrong}"
    return None


def few_layers(config: ModelConfig) -> ModelConfig:
    """The first sliding layer and the first two that read a memory; vocabulary and feed-forward may be smaller."""
    kinds = config.layer_types
    reading = [kind for kind in kinds if kind != "sliding_attention"][:2]
    layers = (*[kind for kind in kinds if kind == "sliding_attention"][:1], *reading)
    return replace(
        config,
        num_hidden_layers=len(layers),
        layer_types=layers,
        index_topk_pattern=config.index_topk_pattern[: len(reading)],
        vocab_size=min(config.vocab_size, MAX_VOCAB),
        intermediate_size=min(config.intermediate_size, config.hidden_size),
        bos_token_id=None,
        eos_token_id=None,
        quantization=None,
    )


class _Checked:
    """An Ops that keeps every selection and what is wrong with it, and otherwise is the one it wraps."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.selections: list[Selection] = []
        self.wrong: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def select(self, q_idx: Array, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
        selection = self._ops.select(q_idx, memory, queries, k, block_size)
        if block_size == 1:
            self.wrong = self.wrong or select_gate(self._ops, q_idx, memory, queries, k)(selection)
        parts = (selection.positions, selection.rows, selection.lengths)
        self.selections.append(Selection(*(self._ops.to_numpy(x) for x in parts)))
        return selection


def _choosing(selections: list[Selection]) -> Ops:
    """The specification, which selects what was selected before."""
    left = iter(selections)
    return cast(Ops, SimpleNamespace(**(vars(spec) | {"select": lambda *_: next(left)})))


def _on_host(ops: Ops, tree: Any) -> Any:
    """The same tree in float64."""
    if isinstance(tree, Mapping):
        return {name: _on_host(ops, value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_on_host(ops, value) for value in tree]
    return host_weight(ops, tree)


def _states(
    ops: Ops, plan: Plan, rows: int, dtype: str, stored: MemoryDtypes, rng: np.random.Generator
) -> tuple[State, State]:
    """The same random state on the device and in the specification."""
    c = plan.config
    device, exact = (new_state(where, plan, rows, 2, dtype, stored) for where in (ops, spec.backend.open(None)))
    memories, windows = list(device.memories), list(device.windows)
    del device

    def pair(count: int, *shape: int) -> tuple[Array, np.ndarray]:
        array = ops.asarray(rng.standard_normal((count, *shape), np.float32), dtype)
        return array, ops.to_numpy(array).astype(np.float64)

    where = np.arange(rows, dtype=np.int32)
    for i, has_index in enumerate(plan.memory_has_index):
        k, v = (pair(rows, c.num_key_value_heads, c.head_dim) for _ in range(2))
        k_idx = pair(rows, c.index_head_dim) if has_index else (None, None)
        memories[i] = ops.write_memory(memories[i], k[0], v[0], k_idx[0], ops.asarray(where))
        spec.write_memory(exact.memories[i], k[1], v[1], k_idx[1], where)
    ring = np.arange(2 * c.sliding_window, dtype=np.int32)
    for i in range(plan.num_windows):
        k, v = (pair(len(ring), c.num_key_value_heads, c.head_dim) for _ in range(2))
        windows[i] = ops.write_window(windows[i], k[0], v[0], ops.asarray(ring))
        spec.write_window(exact.windows[i], k[1], v[1], ring)
    return State(tuple(memories), tuple(windows)), exact
