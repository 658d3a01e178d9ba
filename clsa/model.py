"""The model, written once: pure functions over a tree of arrays, with `ops` passed in.

The same code decodes, prefills, trains and evaluates, on every backend and for every layer plan (paper,
equations 1-4). Shapes use the letters of `clsa.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clsa.config import ModelConfig
from clsa.ops import Array, Memory, Ops, Queries, Selection, State, StepBatch, Window
from clsa.plan import Plan

Params = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows on their way through the layers: all T of them up to the prefill exit, the R wanted ones after it."""

    x: Array  # [T, C] or [R, C]
    queries: Queries
    selection: Selection | None  # the last one computed, whatever kind of layer did

    def narrow(self, ops: Ops, batch: StepBatch) -> _Rows:
        """Keep only the rows whose logits are wanted."""
        if batch.logits_rows is None or batch.logits_queries is None:
            return self
        selection = self.selection and ops.take_selection(self.selection, batch.logits_rows)
        return _Rows(ops.take(self.x, batch.logits_rows), batch.logits_queries, selection)


def forward(ops: Ops, params: Params, plan: Plan, batch: StepBatch, state: State) -> tuple[Array | None, State]:
    """One step: write the state of T tokens, return the logits of the R rows that are wanted.

    Returns: logits [R, V] float32 (None if no row is wanted: the walk ends at the prefill exit), and the new
    state; `state` must not be used again.
    """
    memories, windows = list(state.memories), list(state.windows)
    rows = _Rows(ops.embed(params["embed_tokens"], batch.tokens), batch.queries, None)
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
    x = ops.rms_norm(rows.x, params["norm"], plan.config.rms_norm_eps)
    head = params["embed_tokens"] if plan.config.tie_word_embeddings else params["lm_head"]
    return ops.cast(ops.linear(x, head), "float32"), State(tuple(memories), tuple(windows))


def _sliding_layer(
    ops: Ops, weights: Params, c: ModelConfig, rows: _Rows, window: Window, batch: StepBatch
) -> tuple[_Rows, Window]:
    attn = weights["self_attn"]
    h = ops.rms_norm(rows.x, weights["input_layernorm"], c.rms_norm_eps)
    q = _positioned(ops, c, _heads(ops, c, h, attn["q_proj"]), attn["q_norm"], rows.queries)
    k = _positioned(ops, c, _heads(ops, c, h, attn["k_proj"]), attn["k_norm"], rows.queries)
    v = _heads(ops, c, h, attn["v_proj"])
    o = ops.sliding_attention(q, k, v, window, rows.queries)
    window = ops.write_window(window, k, v, batch.ring_mapping)
    return _Rows(_finish(ops, weights, c, rows.x, o), rows.queries, rows.selection), window


def _memory_layer(
    ops: Ops, params: Params, plan: Plan, i: int, rows: _Rows, memory: Memory, batch: StepBatch
) -> tuple[_Rows, Memory]:
    """A full or cross layer: write (all rows), leave the rows nobody waits for behind, route, read."""
    c, layer, weights = plan.config, plan.layers[i], params["layers"][i]
    full = layer.kind == "full_attention"
    source_norm = weights["input_layernorm"] if full else params["memory"]["norm"]
    m = None  # what K, V and the index are made of: the layer's own normed input, or the shared memory's
    if layer.writes_memory:
        m = ops.rms_norm(rows.x, source_norm, c.rms_norm_eps)
        memory = _write_memory(ops, params, plan, i, m, rows.queries, memory, batch)
        if i == plan.exit_layer:
            if not batch.wants_logits:
                return rows, memory
            rows = rows.narrow(ops, batch)
            m = m if batch.logits_rows is None else ops.take(m, batch.logits_rows)
    h = m if full else ops.rms_norm(rows.x, weights["input_layernorm"], c.rms_norm_eps)
    q = _heads(ops, c, h, weights["self_attn"]["q_proj"])
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
    return _Rows(_finish(ops, weights, c, rows.x, o), rows.queries, selection), memory


def _write_memory(
    ops: Ops, params: Params, plan: Plan, i: int, m: Array, queries: Queries, memory: Memory, batch: StepBatch
) -> Memory:
    """Append K, V and K_idx of the rows `m` [T, C]. RoPE and QK norm on full layers only ("RNoPE")."""
    c, layer, weights = plan.config, plan.layers[i], params["layers"][i]
    assert layer.memory is not None
    if layer.kind == "full_attention":
        attn = weights["self_attn"]
        k = _positioned(ops, c, _heads(ops, c, m, attn["k_proj"]), attn["k_norm"], queries)
        v = _heads(ops, c, m, attn["v_proj"])
        index_weight = weights["indexer"]["k_proj"] if layer.route == "F" else None
    else:
        shared = params["memory"]
        k, v = _heads(ops, c, m, shared["k_proj"]), _heads(ops, c, m, shared["v_proj"])
        index_weight = shared["index_k_proj"] if plan.memory_has_index[layer.memory] else None
    k_idx = None if index_weight is None else ops.linear(m, index_weight)
    return ops.write_memory(memory, k, v, k_idx, batch.slot_mapping)


def _heads(ops: Ops, c: ModelConfig, x: Array, weight: Any) -> Array:
    """[T, C] -> [T, heads, D]."""
    return ops.linear(x, weight).reshape(x.shape[0], -1, c.head_dim)


def _positioned(ops: Ops, c: ModelConfig, x: Array, norm: Array, queries: Queries) -> Array:
    """QK norm per head, then rotary positions: [T, heads, D] -> the same."""
    return ops.rope(ops.rms_norm(x, norm, c.rms_norm_eps), queries.positions, c.rope_theta)


def _finish(ops: Ops, weights: Params, c: ModelConfig, x: Array, o: Array) -> Array:
    """Output projection and feed-forward of a pre-norm residual block: x [T, C], o [T, H, D] -> [T, C]."""
    x = x + ops.linear(o.reshape(x.shape[0], -1), weights["self_attn"]["o_proj"])
    h = ops.rms_norm(x, weights["post_attention_layernorm"], c.rms_norm_eps)
    mlp = weights["mlp"]
    gated = ops.swiglu(ops.linear(h, mlp["gate_proj"]), ops.linear(h, mlp["up_proj"]))
    return x + ops.linear(gated, mlp["down_proj"])


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
