"""The model, written once: pure functions over a tree of arrays, with `ops` passed in.

The same code decodes, prefills, trains and evaluates, on every backend and for every layer plan (paper,
equations 1-4). Shapes use the letters of `clsa.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clsa.config import ModelConfig
from clsa.ops import Array, Memory, Ops, Queries, Selection, State, StepBatch, Window
from clsa.plan import Plan

Params = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows on their way through the layers: all T of them up to the prefill exit, the R wanted ones after it."""

    x: Array  # [T, C] or [R, C]
    delta: Array | None  # what the last block adds to x; the norm that comes next adds it on its way
    queries: Queries
    selection: Selection | None  # the last one computed, whatever kind of layer did

    def narrow(self, ops: Ops, batch: StepBatch) -> _Rows:
        """Keep only the rows whose logits are wanted."""
        if batch.logits_rows is None or batch.logits_queries is None:
            return self
        delta = None if self.delta is None else ops.take(self.delta, batch.logits_rows)
        selection = self.selection and ops.take_selection(self.selection, batch.logits_rows)
        return _Rows(ops.take(self.x, batch.logits_rows), delta, batch.logits_queries, selection)

    def normed(self, ops: Ops, weight: Array, eps: float) -> tuple[_Rows, Array]:
        """These rows with delta added, and their norm."""
        if self.delta is None:
            return self, ops.rms_norm(self.x, weight, eps)
        x, h = ops.add_rms_norm(self.x, self.delta, weight, eps)
        return replace(self, x=x, delta=None), h


def forward(ops: Ops, params: Params, plan: Plan, batch: StepBatch, state: State) -> tuple[Array | None, State]:
    """One step: write the state of T tokens, return the logits of the R rows that are wanted.

    Returns: logits [R, V] float32 (None if no row is wanted: the walk ends at the prefill exit), and the new
    state; `state` must not be used again.
    """
    memories, windows = list(state.memories), list(state.windows)
    rows = _Rows(ops.embed(params["embed_tokens"], batch.tokens), None, batch.queries, None)
    for i, (layer, weights) in enumerate(zip(plan.layers, params["layers"], strict=True)):
        if layer.window is not None:
            rows, windows[layer.window] = _sliding_layer(ops, weights, plan.config, rows, windows[layer.window], batch)
        elif layer.memory is not None:
            rows, memories[layer.memory] = _memory_layer(ops, params, plan, i, rows, memories[layer.memory], batch)
        if i == plan.exit_layer:
            if not batch.wants_logits:
                return None, State(tuple(memories), tuple(windows))
            if not layer.writes_memory:
                rows = rows.narrow(ops, batch)
    _, h = rows.normed(ops, params["norm"], plan.config.rms_norm_eps)
    head = params["embed_tokens"] if plan.config.tie_word_embeddings else params["lm_head"]
    return ops.cast(ops.linear(h, head), "float32"), State(tuple(memories), tuple(windows))


def _sliding_layer(
    ops: Ops, weights: Params, c: ModelConfig, rows: _Rows, window: Window, batch: StepBatch
) -> tuple[_Rows, Window]:
    attn = weights["self_attn"]
    rows, h = rows.normed(ops, weights["input_layernorm"], c.rms_norm_eps)
    q, k, v = _heads(c, ops.linears(h, (attn["q_proj"], attn["k_proj"], attn["v_proj"])))
    q, k = (_positioned(ops, c, x, attn[norm], rows.queries) for x, norm in ((q, "q_norm"), (k, "k_norm")))
    o = ops.sliding_attention(q, k, v, window, rows.queries)
    window = ops.write_window(window, k, v, batch.ring_mapping)
    return _finish(ops, weights, c, rows, o), window


def _memory_layer(
    ops: Ops, params: Params, plan: Plan, i: int, rows: _Rows, memory: Memory, batch: StepBatch
) -> tuple[_Rows, Memory]:
    """A full or cross layer: write (all rows), leave the rows nobody waits for behind, route, read."""
    c, layer, weights = plan.config, plan.layers[i], params["layers"][i]
    full = layer.kind == "full_attention"
    source_norm = weights["input_layernorm"] if full else params["memory"]["norm"]
    m = None  # what K, V and the index are made of: the layer's own normed input, or the shared memory's
    if layer.writes_memory:
        rows, m = rows.normed(ops, source_norm, c.rms_norm_eps)
        memory = _write_memory(ops, params, plan, i, m, rows.queries, memory, batch)
        if i == plan.exit_layer:
            if not batch.wants_logits:
                return rows, memory
            rows = rows.narrow(ops, batch)
            m = m if batch.logits_rows is None else ops.take(m, batch.logits_rows)
    rows, h = (rows, m) if full else rows.normed(ops, weights["input_layernorm"], c.rms_norm_eps)
    (q,) = _heads(c, (ops.linear(h, weights["self_attn"]["q_proj"]),))
    if full:
        q = _positioned(ops, c, q, weights["self_attn"]["q_norm"], rows.queries)
    selection = rows.selection
    if layer.route == "F":
        m = m if m is not None else ops.rms_norm(rows.x, source_norm, c.rms_norm_eps)
        q_idx = ops.linear(m, weights["indexer"]["q_proj"])
        selection = ops.select(q_idx, memory, rows.queries, c.index_topk, c.index_block_size)
    if layer.route == "D":
        o = ops.dense_attention(q, memory, rows.queries)
    else:
        assert selection is not None  # ModelConfig refuses S before F
        o = ops.gather_attention(q, memory, selection)
    return _finish(ops, weights, c, replace(rows, selection=selection), o), memory


def _write_memory(
    ops: Ops, params: Params, plan: Plan, i: int, m: Array, queries: Queries, memory: Memory, batch: StepBatch
) -> Memory:
    """Append K, V and K_idx of the rows `m` [T, C]. RoPE and QK norm on full layers only ("RNoPE")."""
    c, layer, weights = plan.config, plan.layers[i], params["layers"][i]
    assert layer.memory is not None
    full = layer.kind == "full_attention"
    source = weights["self_attn"] if full else params["memory"]
    projections = [source["k_proj"], source["v_proj"]]
    if plan.memory_has_index[layer.memory]:
        projections.append(weights["indexer"]["k_proj"] if full else source["index_k_proj"])
    k, v, *k_idx = ops.linears(m, projections)
    k, v = _heads(c, (k, v))
    if full:
        k = _positioned(ops, c, k, source["k_norm"], queries)
    return ops.write_memory(memory, k, v, k_idx[0] if k_idx else None, batch.slot_mapping)


def _heads(c: ModelConfig, projected: Sequence[Array]) -> tuple[Array, ...]:
    """[T, heads * D] -> [T, heads, D], each."""
    return tuple(x.reshape(x.shape[0], -1, c.head_dim) for x in projected)


def _positioned(ops: Ops, c: ModelConfig, x: Array, norm: Array, queries: Queries) -> Array:
    """QK norm per head, then rotary positions: [T, heads, D] -> the same."""
    return ops.norm_rope(x, norm, c.rms_norm_eps, queries.positions, c.rope_theta)


def _finish(ops: Ops, weights: Params, c: ModelConfig, rows: _Rows, o: Array) -> _Rows:
    """Output projection and feed-forward of a pre-norm residual block: o [T, H, D]."""
    o = ops.linear(o.reshape(o.shape[0], -1), weights["self_attn"]["o_proj"])
    x, h = ops.add_rms_norm(rows.x, o, weights["post_attention_layernorm"], c.rms_norm_eps)
    mlp = weights["mlp"]
    gate, up = ops.linears(h, (mlp["gate_proj"], mlp["up_proj"]))
    return replace(rows, x=x, delta=ops.linear(ops.swiglu(gate, up), mlp["down_proj"]))


def new_state(ops: Ops, plan: Plan, rows: int, slots: int, dtype: str) -> State:
    """Empty state: `rows` tokens of global memory, `slots` window rings."""
    c = plan.config
    memories = tuple(
        ops.new_memory(rows, c.num_key_value_heads, c.head_dim, c.index_head_dim if index else None, dtype)
        for index in plan.memory_has_index
    )
    windows = tuple(
        ops.new_window(slots, c.sliding_window, c.num_key_value_heads, c.head_dim, dtype)
        for _ in range(plan.num_windows)
    )
    return State(memories, windows)


__all__ = ["Params", "forward", "new_state"]
