"""The model, written once: pure functions over a tree of arrays, with `ops` passed in.

The same code decodes, prefills, trains and evaluates, on every backend and for every layer plan (paper,
equations 1-4). Shapes use the letters of `clsa.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clsa.config import MODEL_DTYPE, MemoryDtypes, ModelConfig
from clsa.ops import Array, HeadNorms, Memory, Ops, Queries, Selection, State, StepBatch, Window
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
    head = params["embed_tokens"] if plan.config.tie_word_embeddings else params["lm_head"]
    (logits,) = ops.norm_linears(rows.x, params["norm"], plan.config.rms_norm_eps, (head,), "float32")
    return logits, State(tuple(memories), tuple(windows))


def _sliding_layer(
    ops: Ops, weights: Params, c: ModelConfig, rows: _Rows, window: Window, batch: StepBatch
) -> tuple[_Rows, Window]:
    attn = weights["self_attn"]
    projections = (attn["q_proj"], attn["k_proj"], attn["v_proj"])
    q, k, v = _heads(c, ops.norm_linears(rows.x, weights["input_layernorm"], c.rms_norm_eps, projections))
    norms = HeadNorms(attn["q_norm"], attn["k_norm"], c.rms_norm_eps, c.rope_theta)
    o, window = ops.attend_window(q, k, v, norms, window, rows.queries, batch.ring_mapping)
    return _finish(ops, weights, c, rows, o), window


def _memory_layer(
    ops: Ops, params: Params, plan: Plan, i: int, rows: _Rows, memory: Memory, batch: StepBatch
) -> tuple[_Rows, Memory]:
    """A full or cross layer: write (all rows), leave the rows nobody waits for behind, route, read."""
    c, layer, weights = plan.config, plan.layers[i], params["layers"][i]
    full = layer.kind == "full_attention"
    norm, written, asked = _through_memory_norm(params, plan, i)
    stays = i != plan.exit_layer or batch.logits_rows is None
    made = _projected(ops, c, rows.x, norm, written | asked if stays else written)
    if layer.writes_memory:
        k, v = _heads(c, (made["k"], made["v"]))
        if full:  # no positions in the shared memory ("RNoPE")
            k = _positioned(ops, c, k, weights["self_attn"]["k_norm"], rows.queries)
        memory = ops.write_memory(memory, k, v, made.get("k_idx"), batch.slot_mapping)
    if not stays:
        if not batch.wants_logits:
            return rows, memory
        rows = rows.narrow(ops, batch)
        made = _projected(ops, c, rows.x, norm, asked)
    selection = rows.selection
    if layer.route == "F":
        selection = ops.select(made["q_idx"], memory, rows.queries, c.index_topk, c.index_block_size)
    if full:
        (q,) = _heads(c, (made["q"],))
        q = _positioned(ops, c, q, weights["self_attn"]["q_norm"], rows.queries)
    else:
        norm, q_proj = weights["input_layernorm"], weights["self_attn"]["q_proj"]
        (q,) = _heads(c, ops.norm_linears(rows.x, norm, c.rms_norm_eps, (q_proj,)))
    if layer.route == "D":
        o = ops.dense_attention(q, memory, rows.queries)
    else:
        assert selection is not None  # ModelConfig refuses S before F
        o = ops.gather_attention(q, memory, selection)
    return _finish(ops, weights, c, _Rows(rows.x, rows.queries, selection), o), memory


def _through_memory_norm(params: Params, plan: Plan, i: int) -> tuple[Array, dict[str, Any], dict[str, Any]]:
    """The norm that K, V and the index are made through, and the weights of what is written and asked through it.

    In a full layer that is its own norm, and the query is made through it too. The shared memory has a norm of its own.
    """
    layer, weights = plan.layers[i], params["layers"][i]
    full = layer.kind == "full_attention"
    norm = weights["input_layernorm"] if full else params["memory"]["norm"]
    written, asked = {}, {}
    if layer.writes_memory:
        assert layer.memory is not None
        source = weights["self_attn"] if full else params["memory"]
        written = {"k": source["k_proj"], "v": source["v_proj"]}
        if plan.memory_has_index[layer.memory]:
            written["k_idx"] = weights["indexer"]["k_proj"] if full else source["index_k_proj"]
    if layer.route == "F":
        asked["q_idx"] = weights["indexer"]["q_proj"]
    if full:
        asked["q"] = weights["self_attn"]["q_proj"]
    return norm, written, asked


def _projected(ops: Ops, c: ModelConfig, x: Array, norm: Array, weights: Mapping[str, Any]) -> dict[str, Array]:
    """All rows through a norm and then through each of the weights, in one call: [T, out] each."""
    if not weights:
        return {}
    return dict(zip(weights, ops.norm_linears(x, norm, c.rms_norm_eps, tuple(weights.values())), strict=True))


def _heads(c: ModelConfig, projected: Sequence[Array]) -> tuple[Array, ...]:
    """[T, heads * D] -> [T, heads, D], each."""
    return tuple(x.reshape(x.shape[0], -1, c.head_dim) for x in projected)


def _positioned(ops: Ops, c: ModelConfig, x: Array, norm: Array, queries: Queries) -> Array:
    """QK norm per head, then rotary positions: [T, heads, D] -> the same."""
    return ops.norm_rope(x, norm, c.rms_norm_eps, queries.positions, c.rope_theta)


def _finish(ops: Ops, weights: Params, c: ModelConfig, rows: _Rows, o: Array) -> _Rows:
    """Output projection and feed-forward of a pre-norm residual block: o [T, H, D]."""
    mlp = weights["mlp"]
    x = ops.close_layer(
        rows.x,
        o.reshape(o.shape[0], -1),
        weights["self_attn"]["o_proj"],
        weights["post_attention_layernorm"],
        c.rms_norm_eps,
        mlp["gate_proj"],
        mlp["up_proj"],
        mlp["down_proj"],
    )
    return _Rows(x, rows.queries, rows.selection)


def new_state(ops: Ops, plan: Plan, rows: int, slots: int, dtype: str, stored: MemoryDtypes = MODEL_DTYPE) -> State:
    """Empty state: `rows` tokens of global memory, `slots` window rings."""
    c = plan.config
    memories = tuple(
        ops.new_memory(rows, c.num_key_value_heads, c.head_dim, c.index_head_dim if index else None, dtype, stored)
        for index in plan.memory_has_index
    )
    windows = tuple(
        ops.new_window(slots, c.sliding_window, c.num_key_value_heads, c.head_dim, dtype)
        for _ in range(plan.num_windows)
    )
    return State(memories, windows)


__all__ = ["Params", "forward", "new_state"]
