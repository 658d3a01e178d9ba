"""The model, written once: pure functions over a tree of arrays, with `ops` passed in.

The same code decodes, prefills, trains and evaluates, on every backend and for every layer plan (paper,
equations 1-4). Shapes use the letters of `clsa.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from clsa.config import MODEL_DTYPE, MemoryDtypes, ModelConfig
from clsa.ops import Array, HeadNorms, Memory, Ops, Queries, Rows, State, StepBatch, Window
from clsa.plan import Plan

Params = Mapping[str, Any]


def forward(ops: Ops, params: Params, plan: Plan, batch: StepBatch, state: State) -> tuple[Array | None, State]:
    """One step: write the state of T tokens, return the logits of the R rows that are wanted.

    Returns: logits [R, V] float32 (None if no row is wanted: the walk ends at the prefill exit), and the new
    state; `state` must not be used again.
    """
    rows, state = enter(ops, params, plan, batch, state)
    return None if rows is None else leave(ops, params, plan, rows, state), state


def enter(ops: Ops, params: Params, plan: Plan, batch: StepBatch, state: State) -> tuple[Rows | None, State]:
    """The first part of `forward`, up to the prefill exit: all that writes state.

    Returns: the R rows that are wanted (None if there are none) and the new state; `state` must not be used again.
    """
    memories, windows = list(state.memories), list(state.windows)
    rows = Rows(ops.embed(params["embed_tokens"], batch.tokens), batch.queries, None)
    for i, layer in enumerate(plan.layers[: plan.exit_layer + 1]):
        if layer.window is not None:
            rows, windows[layer.window] = _sliding_layer(ops, params, plan, i, rows, windows[layer.window], batch)
        if layer.memory is not None:
            if layer.writes_memory:
                rows, memories[layer.memory] = _write(ops, params, plan, i, rows, memories[layer.memory], batch)
            if i != plan.exit_layer:
                rows = _read(ops, params, plan, i, rows, memories[layer.memory])
    state = State(tuple(memories), tuple(windows))
    return (_wanted(ops, rows, batch) if batch.wants_logits else None), state


def leave(ops: Ops, params: Params, plan: Plan, rows: Rows, state: State) -> Array:
    """The rest of `forward`: from the rows that `enter` returns to their logits [R, V] float32. State is only read."""
    for i, layer in enumerate(plan.layers):
        if layer.memory is not None and i >= plan.exit_layer:
            rows = _read(ops, params, plan, i, rows, state.memories[layer.memory])
    head = params["embed_tokens"] if plan.config.tie_word_embeddings else params["lm_head"]
    (logits,) = ops.norm_linears(rows.x, params["norm"], plan.config.rms_norm_eps, (head,), "float32")
    return logits


def _wanted(ops: Ops, rows: Rows, batch: StepBatch) -> Rows:
    """Only the rows whose logits are wanted."""
    if batch.logits_rows is None or batch.logits_queries is None:
        return rows
    selection = rows.selection and ops.take_selection(rows.selection, batch.logits_rows)
    return Rows(ops.take(rows.x, batch.logits_rows), batch.logits_queries, selection)


def _sliding_layer(
    ops: Ops, params: Params, plan: Plan, i: int, rows: Rows, window: Window, batch: StepBatch
) -> tuple[Rows, Window]:
    c, weights = plan.config, params["layers"][i]
    attn = weights["self_attn"]
    projections = (attn["q_proj"], attn["k_proj"], attn["v_proj"])
    q, k, v = _heads(c, ops.norm_linears(rows.x, weights["input_layernorm"], c.rms_norm_eps, projections))
    norms = HeadNorms(attn["q_norm"], attn["k_norm"], c.rms_norm_eps, c.rope_theta)
    o, window = ops.attend_window(q, k, v, norms, window, rows.queries, batch.ring_mapping)
    return _finish(ops, weights, c, rows, o), window


def _write(
    ops: Ops, params: Params, plan: Plan, i: int, rows: Rows, memory: Memory, batch: StepBatch
) -> tuple[Rows, Memory]:
    """K, V and index keys of all rows. Made with them: what the layer's queries need, unless rows leave before that."""
    c, layer, weights = plan.config, plan.layers[i], params["layers"][i]
    norm, written, asked = _through_memory_norm(params, plan, i)
    stays = i != plan.exit_layer or batch.logits_rows is None
    made = _projected(ops, c, rows.x, norm, written | asked if stays else written)
    k, v = _heads(c, (made["k"], made["v"]))
    if layer.kind == "full_attention":  # no positions in the shared memory ("RNoPE")
        k = _positioned(ops, c, k, weights["self_attn"]["k_norm"], rows.queries)
    memory = ops.write_memory(memory, k, v, made.get("k_idx"), batch.slot_mapping)
    return replace(rows, made={name: made[name] for name in asked} if stays else None), memory


def _read(ops: Ops, params: Params, plan: Plan, i: int, rows: Rows, memory: Memory) -> Rows:
    """A full or cross layer behind its write: route, read, feed forward."""
    c, layer, weights = plan.config, plan.layers[i], params["layers"][i]
    norm, _, asked = _through_memory_norm(params, plan, i)
    made = _projected(ops, c, rows.x, norm, asked) if rows.made is None else rows.made
    selection = rows.selection
    if layer.route == "F":
        selection = ops.select(made["q_idx"], memory, rows.queries, c.index_topk, c.index_block_size)
    if layer.kind == "full_attention":
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
    return _finish(ops, weights, c, replace(rows, selection=selection, made=None), o)


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


def _finish(ops: Ops, weights: Params, c: ModelConfig, rows: Rows, o: Array) -> Rows:
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
    return replace(rows, x=x)


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


__all__ = ["Params", "enter", "forward", "leave", "new_state"]
