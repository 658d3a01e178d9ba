"""Is it right? Every op that is timed is first held against `clsa.spec`, on a sample of rows and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from clsa import spec
from clsa.config import PAGE_SIZE
from clsa.ops import Array, Float8Weight, HeadNorms, Memory, Ops, Queries, SamplingBatch, Selection, Weight, Window

# Relative RMS error: rounding to the dtype a few times, and float32 sums of 100,000 terms in any order.
LIMITS = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
SCORE_ERROR = 4e-6  # by which share of |q| |k| a score may differ from the exact one

Gate = Callable[[Any], str | None]  # what an op returned -> what is wrong with it


def difference(got: np.ndarray, want: np.ndarray, dtype: str, roundings: int = 1, angle: float = 0.0) -> str | None:
    """None, or how far `got` is from `want` if that is more than rounding so many times over.

    `angle` is the largest that was rounded to float32 before its sine was taken: that turns what it turns.
    """
    if got.shape != want.shape:
        return f"shape {got.shape}, wanted {want.shape}"
    scale = float(np.linalg.norm(want))
    error = float(np.linalg.norm(np.asarray(got, np.float64) - want)) / (scale if scale > 0 else 1.0)
    limit = roundings * LIMITS[dtype] + angle * 2.0**-25
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


def host_weight(ops: Ops, weight: Weight) -> np.ndarray:
    """A weight on the host, in float64."""
    exact: np.ndarray
    if isinstance(weight, Float8Weight):
        exact = host_weight(ops, weight.values) * host_weight(ops, weight.scales)[:, None]
    else:
        exact = ops.to_numpy(weight).astype(np.float64)
    return exact


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


def window_gate(
    ops: Ops, q: Array, k: Array, v: Array, norms: HeadNorms, queries: Queries, ring_mapping: Array, dtype: str
) -> Gate:
    """The specification on one token of one sequence at a time, and the row of the ring that it is written to."""

    def gate(out: tuple[Array, Window]) -> str | None:
        attended, window = out
        asked, keys, values = (ops.to_numpy(x).astype(np.float64) for x in (q, k, v))
        exact = replace(norms, q=host_weight(ops, norms.q), k=host_weight(ops, norms.k))
        got, positions, own = (ops.to_numpy(x) for x in (attended, queries.positions, ring_mapping))
        slots = ops.to_numpy(queries.window_slots)
        for b in sampled_rows(len(asked)):
            # The ring as it is left will do: the row that is written held a token that is out of sight.
            ring = np.arange(slots[b] * window.size, (slots[b] + 1) * window.size)
            alone = Window(host_rows(ops, window.k, ring), host_rows(ops, window.v, ring), window.size)
            written = [x[own[b] % window.size].copy() for x in (alone.k, alone.v)]
            zero, context = np.zeros(1, np.int32), (int(positions[b]) + 1,)
            one = Queries(positions[b : b + 1], zero, zero[None], zero, (0, 1), context)
            here, local = slice(b, b + 1), own[b : b + 1] % window.size
            want, after = spec.attend_window(asked[here], keys[here], values[here], exact, alone, one, local)
            if wrong := difference(got[here], want, dtype, angle=int(positions[b])):
                return f"query {b}: {wrong}"
            for name, row, ring_after in zip("kv", written, (after.k, after.v), strict=True):
                if wrong := difference(row, ring_after[local[0]], dtype, angle=int(positions[b])):
                    return f"query {b}: {name} in the ring: {wrong}"
        return None

    return gate


def linear_gate(ops: Ops, x: Array, weight: Weight, dtype: str) -> Gate:
    """Sixteen columns of a matrix product."""

    def gate(out: Array) -> str | None:
        first = weight.values if isinstance(weight, Float8Weight) else weight
        columns = np.linspace(0, first.shape[0] - 1, 16).astype(np.int64)
        matrix = host_rows(ops, first, columns)
        if isinstance(weight, Float8Weight):
            matrix *= host_rows(ops, weight.scales, columns)[:, None]
        want = ops.to_numpy(x).astype(np.float64) @ matrix.T
        return difference(ops.to_numpy(out)[:, columns], want, dtype)

    return gate


def close_layer_gate(
    ops: Ops,
    x: Array,
    o: Array,
    o_proj: Weight,
    norm: Array,
    eps: float,
    gate: Weight,
    up: Weight,
    down: Weight,
    dtype: str,
) -> Gate:
    """The end of a layer for the first row."""

    def check(out: Array) -> str | None:
        first, attended = (ops.to_numpy(a)[:1].astype(np.float64) for a in (x, o))
        w_o, scale, w_gate, w_up, w_down = (host_weight(ops, w) for w in (o_proj, norm, gate, up, down))
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
