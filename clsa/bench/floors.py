"""What a step cannot do without: the bytes it must move and the operations it must do. Pure arithmetic.

Every input is counted once and every result that leaves the step not at all: activations, new rows of state and page
tables are small beside what is counted. Selected rows count once per layer that reads them, although a cache may
keep them from one layer to the next. Letters are those of `clsa.ops`, F is the intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from clsa.config import MODEL_DTYPE, MemoryDtypes, ModelConfig
from clsa.params import stored_tensors, tensor_shapes
from clsa.plan import LayerPlan, make_plan
from clsa.weights import in_float8

_SCALE = 4  # bytes of the scale that a row of a float8 matrix has


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that one decode step must read."""

    weights: int  # once, whatever the batch
    index_keys: int
    windows: int
    selected: int  # K and V rows of selections
    dense: int  # K and V rows of everything visible

    @property
    def total(self) -> int:
        return sum(astuple(self))


def decode_bytes(
    config: ModelConfig,
    context: int,
    batch: int,
    itemsize: int,
    stored: MemoryDtypes = MODEL_DTYPE,
    weight_dtype: str | None = None,
) -> StepBytes:
    """Bytes of a decode step of `batch` sequences that see `context` tokens each.

    A number takes `itemsize` bytes, or one where `stored` or `weight_dtype` say "fp8". Of an untied embedding only the
    rows of the tokens are read, which do not count.
    """
    rows = {"windows": 0, "selected": 0, "dense": 0, "index_keys": 0}
    for layer in make_plan(config).layers:
        for what, count in _rows_read(config, layer, context):
            rows[what] += count
    kv_numbers, kv, index = _memory_numbers(config, itemsize, stored)
    return StepBytes(
        weights=weight_bytes(config, itemsize, weight_dtype),
        index_keys=batch * rows["index_keys"] * config.index_head_dim * index,
        windows=batch * rows["windows"] * kv_numbers * itemsize,
        selected=batch * rows["selected"] * kv_numbers * kv,
        dense=batch * rows["dense"] * kv_numbers * kv,
    )


def _memory_numbers(config: ModelConfig, itemsize: int, stored: MemoryDtypes) -> tuple[int, int, int]:
    """Numbers of a row of K and V, and bytes of each number of K and V and of an index key."""
    numbers = 2 * config.num_key_value_heads * config.head_dim
    return numbers, 1 if stored.kv else itemsize, 1 if stored.index else itemsize


def _rows_read(config: ModelConfig, layer: LayerPlan, context: int) -> list[tuple[str, int]]:
    if layer.window is not None:
        return [("windows", min(context, config.sliding_window))]
    if layer.route == "D":
        return [("dense", context)]
    selected = [("selected", min(context, config.index_topk))]
    return [*selected, ("index_keys", context)] if layer.route == "F" else selected


def weight_bytes(config: ModelConfig, itemsize: int, weight_dtype: str | None = None) -> int:
    """Bytes of the weights that a decode step reads in full, quantised where the config or `weight_dtype` say so."""
    stored = stored_tensors(config)
    if not config.tie_word_embeddings:
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith("model.embed_tokens.")}
    return sum(
        _matrix_bytes([(shape[0], shape[1])], itemsize, weight_dtype)
        if weight_dtype and in_float8(name, shape)
        else math.prod(shape) * (4 if packed else itemsize)
        for name, (shape, packed) in stored.items()
    )


def _matrix_bytes(shapes: Sequence[tuple[int, int]], itemsize: int, weight_dtype: str | None) -> int:
    """Bytes of projections [out, in] of a layer."""
    each, scale = (1, _SCALE) if weight_dtype else (itemsize, 0)
    return sum(out * width * each + out * scale for out, width in shapes)


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Floating-point operations of one prompt of `tokens`, two per multiply-add, the last logits left out.

    Matrix products of every layer that a position whose logits are not wanted passes, attention over what is
    visible, and the scores of layers that route.
    """
    plan = make_plan(config)
    pairs = tokens * (tokens + 1) // 2  # of a query and a token it sees
    flops = 2 * tokens * _prompt_parameters(config)
    for layer in plan.layers[: plan.exit_layer + 1]:
        if layer.kind == "cross_attention":
            continue  # it writes the memory, and only wanted rows go on
        if layer.window is not None:
            seen = pairs - _pairs_beyond(tokens, config.sliding_window)
        elif layer.route == "D":
            seen = pairs
        else:
            seen = pairs - _pairs_beyond(tokens, config.index_topk)
        flops += 4 * seen * config.num_attention_heads * config.head_dim
        if layer.route == "F":
            flops += 2 * pairs * config.index_head_dim
    return flops


def _pairs_beyond(tokens: int, limit: int) -> int:
    """Pairs of a query and a visible token that are more than `limit` tokens per query."""
    rest = max(0, tokens - limit)
    return rest * (rest + 1) // 2


def _prompt_parameters(config: ModelConfig) -> int:
    """Parameters of the matrix products that every prompt position passes."""
    plan = make_plan(config)
    kv = config.num_key_value_heads * config.head_dim
    total = 0
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1 or not name.startswith("model.layers."):
            continue
        layer = int(name.split(".")[2])
        if layer <= plan.exit_layer and plan.layers[layer].kind != "cross_attention":
            total += shape[0] * shape[1]
    if any(layer.kind == "cross_attention" for layer in plan.layers):
        shared = next(layer.memory for layer in plan.layers if layer.kind == "cross_attention")
        assert shared is not None
        total += config.hidden_size * (2 * kv + plan.memory_has_index[shared] * config.index_head_dim)
    return total


def op_bytes(
    op: str,
    config: ModelConfig,
    context: int,
    batch: int,
    itemsize: int,
    stored: MemoryDtypes = MODEL_DTYPE,
    weight_dtype: str | None = None,
) -> int:
    """Bytes that one call of an op must move: what it reads, and what it returns where that is not negligible."""
    c = config
    kv_numbers, kv, index = _memory_numbers(c, itemsize, stored)
    kv_row, window_row = kv_numbers * kv, kv_numbers * itemsize
    rows, wide_rows = batch * c.hidden_size * itemsize, batch * c.intermediate_size * itemsize
    q_and_o = 2 * batch * c.num_attention_heads * c.head_dim * itemsize
    chosen = min(context, c.index_topk)
    counted = {
        "select": batch * (context * c.index_head_dim * index + 8 * chosen),
        "gather_attention": batch * chosen * (kv_row + 4) + q_and_o,
        "dense_attention": batch * context * kv_row + q_and_o,
        # The new row is one of those that are attended to, and it is written.
        "attend_window": batch * (min(context, c.sliding_window) + 1) * window_row + q_and_o,
        "linear": _matrix_bytes([_widening(c)], itemsize, weight_dtype) + rows + wide_rows,
        "close_layer": _matrix_bytes(_closing(c), itemsize, weight_dtype) + 2 * rows + q_and_o // 2,
        "lm_head": (c.hidden_size * c.vocab_size + batch * (c.hidden_size + c.vocab_size)) * itemsize,
        "sample": batch * c.vocab_size * 4,
        "sample_top_p": batch * c.vocab_size * 4,
    }
    return counted[op]


def _closing(c: ModelConfig) -> list[tuple[int, int]]:
    """[out, in] of a layer's output projection and feed-forward."""
    return [(c.hidden_size, c.num_attention_heads * c.head_dim), *[_widening(c)] * 2, _widening(c)[::-1]]


def _widening(c: ModelConfig) -> tuple[int, int]:
    return c.intermediate_size, c.hidden_size


def op_flops(op: str, config: ModelConfig, context: int, batch: int) -> int:
    """Floating-point operations of one call of an op, two per multiply-add; 0 for what is no arithmetic to speak of."""
    c = config
    attended = 4 * batch * c.num_attention_heads * c.head_dim  # per row of K and V
    per_op = {
        "select": 2 * batch * context * c.index_head_dim,
        "gather_attention": attended * min(context, c.index_topk),
        "dense_attention": attended * context,
        "attend_window": attended * min(context, c.sliding_window),
        "linear": 2 * batch * c.hidden_size * c.intermediate_size,
        "close_layer": 2 * batch * sum(out * width for out, width in _closing(c)),
        "lm_head": 2 * batch * c.hidden_size * c.vocab_size,
    }
    return per_op.get(op, 0)
