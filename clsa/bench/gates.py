"""Is it right? Every op that is timed is first held against `clsa.spec`, on a sample of rows and heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from clsa import spec
from clsa.config import PAGE_SIZE
from clsa.ops import Array, Memory, Ops, Queries, SamplingBatch, Selection, Window

# Relative RMS error: rounding to the dtype a few times, and float32 sums of 100,000 terms in any order.
LIMITS = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
SCORE_ERROR = 4e-6  # by which share of |q| |k| a score may differ from the exact one

Gate = Callable[[Any], str | None]  # what an op returned -> what is wrong with it


def difference(got: np.ndarray, want: np.ndarray, dtype: str, roundings: int = 1) -> str | None:
    """None, or how far `got` is from `want` if that is more than rounding so many times over."""
    if got.shape != want.shape:
        return f"shape {got.shape}, wanted {want.shape}"
    scale = float(np.linalg.norm(want))
    error = float(np.linalg.norm(np.asarray(got, np.float64) - want)) / (scale if scale > 0 else 1.0)
    limit = roundings * LIMITS[dtype]
    return None if error <= limit else f"relative error {error:.2g}, at most {limit:g} is rounding"


def sampled_rows(count: int) -> list[int]:
    """The queries whose results are checked."""
    return sorted({0, count - 1})


def rows_of(queries: Queries, ops: Ops, query: int) -> np.ndarray:
    """Physical rows of all positions that a query sees."""
    table = ops.to_numpy(queries.block_table)[int(ops.to_numpy(queries.sequence)[query])]
    positions = np.arange(int(ops.to_numpy(queries.positions)[query]) + 1)
    rows: np.ndarray = table[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    return rows


def host_rows(ops: Ops, x: Array, rows: np.ndarray) -> np.ndarray:
    """Rows of a large array on the host, in float64."""
    return _host(ops, x, rows).astype(np.float64)


def _host(ops: Ops, x: Array, rows: np.ndarray) -> np.ndarray:
    return ops.to_numpy(ops.take(x, ops.asarray(rows.astype(np.int32))))


def select_gate(ops: Ops, q_idx: Array, memory: Memory, queries: Queries, k: int) -> Gate:
    """The form of a selection, and that nothing left out beats what was taken."""

    def gate(selection: Selection) -> str | None:
        queries_host = ops.to_numpy(q_idx).astype(np.float64)
        positions, rows = ops.to_numpy(selection.positions), ops.to_numpy(selection.rows)
        lengths = ops.to_numpy(selection.lengths)
        for b in sampled_rows(len(queries_host)):
            visible = rows_of(queries, ops, b)
            count = min(k, len(visible))
            chosen = positions[b, :count]
            if lengths[b] != count or (positions[b, count:] != -1).any() or (rows[b, count:] != -1).any():
                return f"query {b}: {lengths[b]} selected, wanted {count} and -1 behind them"
            if chosen[0] < 0 or chosen[-1] >= len(visible) or (np.diff(chosen) <= 0).any():
                return f"query {b}: positions are not ascending within 0..{len(visible) - 1}"
            if (rows[b, :count] != visible[chosen]).any():
                return f"query {b}: rows are not those of the positions"
            keys = host_rows(ops, memory.k_idx, visible)
            scores = keys @ queries_host[b]
            left = np.delete(scores, chosen)
            slack = SCORE_ERROR * np.linalg.norm(queries_host[b]) * np.linalg.norm(keys, axis=1).max()
            if len(left) and scores[chosen].min() < left.max() - slack:
                return f"query {b}: a better position was left out"
        return None

    return gate


def attention_gate(ops: Ops, q: Array, memory: Memory, rows: Callable[[int], np.ndarray], dtype: str) -> Gate:
    """Attention over `rows(query)`, for the first and the last head of some queries."""

    def gate(out: Array) -> str | None:
        asked, got = ops.to_numpy(q).astype(np.float64), ops.to_numpy(out)
        group = asked.shape[1] // memory.k.shape[1]
        for b in sampled_rows(len(asked)):
            seen = rows(b)
            keys, values = (_host(ops, x, seen[seen >= 0]) for x in (memory.k, memory.v))
            for head in (0, asked.shape[1] - 1):
                k, v = (x[:, head // group, None].astype(np.float64) for x in (keys, values))
                want = spec.attend(asked[b, head : head + 1], k, v)
                if wrong := difference(got[b, head : head + 1], want, dtype):
                    return f"query {b}, head {head}: {wrong}"
        return None

    return gate


def sliding_gate(ops: Ops, q: Array, k: Array, v: Array, window: Window, queries: Queries, dtype: str) -> Gate:
    """The specification on one sequence at a time."""

    def gate(out: Array) -> str | None:
        asked, keys, values = (ops.to_numpy(x).astype(np.float64) for x in (q, k, v))
        got, positions = ops.to_numpy(out), ops.to_numpy(queries.positions)
        slots = ops.to_numpy(queries.window_slots)
        for b in sampled_rows(len(asked)):
            ring = np.arange(slots[b] * window.size, (slots[b] + 1) * window.size)
            alone = Window(host_rows(ops, window.k, ring), host_rows(ops, window.v, ring), window.size)
            zero, context = np.zeros(1, np.int32), (int(positions[b]) + 1,)
            one = Queries(positions[b : b + 1], zero, zero[None], zero, (0, 1), context)
            want = spec.sliding_attention(asked[b : b + 1], keys[b : b + 1], values[b : b + 1], alone, one)
            if wrong := difference(got[b : b + 1], want, dtype):
                return f"query {b}: {wrong}"
        return None

    return gate


def linear_gate(ops: Ops, x: Array, weight: Array, dtype: str) -> Gate:
    """Sixteen columns of a matrix product."""

    def gate(out: Array) -> str | None:
        columns = np.linspace(0, weight.shape[0] - 1, 16).astype(np.int64)
        want = ops.to_numpy(x).astype(np.float64) @ host_rows(ops, weight, columns).T
        return difference(ops.to_numpy(out)[:, columns], want, dtype)

    return gate


def close_layer_gate(
    ops: Ops,
    x: Array,
    o: Array,
    o_proj: Array,
    norm: Array,
    eps: float,
    gate: Array,
    up: Array,
    down: Array,
    dtype: str,
) -> Gate:
    """The end of a layer for the first row."""

    def check(out: Array) -> str | None:
        first, attended = (ops.to_numpy(a)[:1].astype(np.float64) for a in (x, o))
        w_o, scale, w_gate, w_up, w_down = (ops.to_numpy(w).astype(np.float64) for w in (o_proj, norm, gate, up, down))
        want = spec.close_layer(first, attended, w_o, scale, eps, w_gate, w_up, w_down)
        return difference(ops.to_numpy(out)[:1], want, dtype)

    return check


def sample_gate(ops: Ops, logits: Array, arguments: SamplingBatch) -> Gate:
    """The same tokens as the specification. `arguments` are those of the op, on the host."""

    def gate(out: Any) -> str | None:
        values, tokens = ops.to_numpy(logits).astype(np.float64), ops.to_numpy(out.tokens)
        want = spec.sample(values, arguments).tokens
        wrong = np.flatnonzero(tokens != want)
        return f"row {wrong[0]}: token {tokens[wrong[0]]}, wanted {want[wrong[0]]}" if len(wrong) else None

    return gate
