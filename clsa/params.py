"""Which tensors a config calls for, by name, shape and form, and what weights and state cost; known only here.

Two forms of the same thing: flat (dotted names, as in a checkpoint) and nested (the tree that the model reads,
`params["layers"][0]["self_attn"]["q_proj"]`). Shapes use the letters of `clsa.ops`, and F for
the intermediate size.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from clsa.config import DTYPES, FP8, MODEL_DTYPE, MemoryDtypes, ModelConfig, check_int, show
from clsa.errors import CheckpointError, ConfigError
from clsa.plan import LayerPlan, make_plan

INIT_STD = 0.02
_DTYPE_BYTES = dict(zip((*DTYPES, FP8), (4, 2, 2, 1), strict=True))
_NAME = re.compile(
    r"(?:lm_head|model\.(?:embed_tokens|norm|memory\.[a-z_]+|layers\.(0|[1-9]\d{0,3})\."
    r"(?:input_layernorm|post_attention_layernorm|(?:self_attn|indexer|mlp)\.[a-z_]+)))\.weight"
)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one number of that dtype. Raises ConfigError on a name that is neither in DTYPES nor "fp8"."""
    if dtype not in _DTYPE_BYTES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPE_BYTES)}, got {show(dtype)}")
    return _DTYPE_BYTES[dtype]


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint: packed integers (uint32), or floating point of any length."""

    shape: tuple[int, ...]
    packed: bool = False


def stored_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Name and form of exactly the tensors that a checkpoint of `config` holds.

    With `config.quantization` a matrix whose rows are a multiple of the group size, the embedding too, is stored as
    mlx-lm does: X.weight packed, X.scales and X.biases beside it; see `clsa.ops.QuantizedWeight` for the shapes.
    Norms and matrices with other rows stay as they are.
    """
    how, stored = config.quantization, dict[str, StoredTensor]()
    for name, shape in tensor_shapes(config).items():
        if how is None or len(shape) < 2 or shape[-1] % how.group_size:
            stored[name] = StoredTensor(shape)
            continue
        rows, width = shape
        stored[name] = StoredTensor((rows, width * how.bits // 32), packed=True)
        for part in ("scales", "biases"):
            stored[f"{name.removesuffix('weight')}{part}"] = StoredTensor((rows, width // how.group_size))
    return stored


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the weights that `config` calls for, however they are stored; projections are [out, in]."""
    C, V, G_D, I = config.hidden_size, config.vocab_size, _kv_width(config), config.index_head_dim
    plan = make_plan(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, C)}
    for i, layer in enumerate(plan.layers):
        for name, shape in _layer_shapes(config, layer).items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    shared = next((layer.memory for layer in plan.layers if layer.kind == "cross_attention"), None)
    if shared is not None:
        shapes["model.memory.norm.weight"] = (C,)
        shapes["model.memory.k_proj.weight"] = (G_D, C)
        shapes["model.memory.v_proj.weight"] = (G_D, C)
        if plan.memory_has_index[shared]:
            shapes["model.memory.index_k_proj.weight"] = (I, C)
    shapes["model.norm.weight"] = (C,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, C)
    return shapes


def _layer_shapes(config: ModelConfig, layer: LayerPlan) -> dict[str, tuple[int, ...]]:
    C, D, F, I = config.hidden_size, config.head_dim, config.intermediate_size, config.index_head_dim
    H_D, G_D = config.num_attention_heads * D, _kv_width(config)
    own_kv = layer.kind != "cross_attention"
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm": (C,), "self_attn.q_proj": (H_D, C)}
    if own_kv:
        shapes |= {"self_attn.k_proj": (G_D, C), "self_attn.v_proj": (G_D, C)}
    shapes["self_attn.o_proj"] = (C, H_D)
    if own_kv:
        shapes |= {"self_attn.q_norm": (D,), "self_attn.k_norm": (D,)}
    if layer.route == "F":
        shapes["indexer.q_proj"] = (I, C)
        if own_kv:
            shapes["indexer.k_proj"] = (I, C)
    shapes["post_attention_layernorm"] = (C,)
    return shapes | {"mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F)}


def _kv_width(config: ModelConfig) -> int:
    return config.num_key_value_heads * config.head_dim


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that the model reads, of the same values: "model." and ".weight" go, layers become a list.

    Layers of which `flat` holds nothing are empty dicts, so a part of the tensors nests too. Raises
    CheckpointError on a name of another form.
    """
    tree: dict[str, Any] = {}
    layers: dict[int, dict[str, Any]] = {}
    for name, value in flat.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{name!r} is not the name of a clsa tensor")
        path = name.removeprefix("model.").removesuffix(".weight").split(".")
        node = tree
        if match[1] is not None:
            node = layers.setdefault(int(match[1]), {})
            path = path[2:]
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    if layers:
        tree["layers"] = [layers.get(i, {}) for i in range(max(layers) + 1)]
    return tree


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted names of a tree that `nest` made, with the same values; `flatten(nest(flat)) == flat`."""
    flat: dict[str, Any] = {}
    _flatten(tree, "", flat)
    return {f"{name if name == 'lm_head' else 'model.' + name}.weight": value for name, value in flat.items()}


def _flatten(node: Any, prefix: str, flat: dict[str, Any]) -> None:
    if isinstance(node, Mapping):
        items = [(str(key), value) for key, value in node.items()]
    elif isinstance(node, (list, tuple)):
        items = [(str(i), value) for i, value in enumerate(node)]
    else:
        flat[prefix] = node
        return
    for key, value in items:
        _flatten(value, f"{prefix}.{key}" if prefix else key, flat)


def init_params(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Fresh weights, flat, float32: norms 1, everything else normal with standard deviation 0.02.

    Projections that write to the residual stream are smaller by sqrt(2 * layers). Each tensor depends only on
    `seed`, its name and its shape, so two plans of equal sizes share what they have in common.
    """
    check_int("seed", seed, 0, (1 << 63) - 1)
    residual = INIT_STD / math.sqrt(2 * config.num_hidden_layers)
    params: dict[str, np.ndarray] = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            params[name] = np.ones(shape, np.float32)
            continue
        std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else INIT_STD
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        values = np.random.default_rng([seed, key]).standard_normal(shape, dtype=np.float32)
        params[name] = np.multiply(values, np.float32(std), out=values)
    return params


def num_parameters(config: ModelConfig) -> int:
    """How many numbers the weights have."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def num_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all weights in `dtype`."""
    return num_parameters(config) * dtype_bytes(dtype)


def state_numbers_per_token(config: ModelConfig) -> tuple[int, int]:
    """How many numbers of K and V, and of index keys, each further token of a sequence costs in all memories."""
    has_index = make_plan(config).memory_has_index
    return len(has_index) * 2 * _kv_width(config), sum(has_index) * config.index_head_dim


def state_bytes_per_token(config: ModelConfig, dtype: str, stored: MemoryDtypes = MODEL_DTYPE) -> int:
    """Bytes of global state that each further token of a sequence costs: K, V and K_idx of all memories."""
    kv, index = state_numbers_per_token(config)
    return kv * dtype_bytes(stored.kv or dtype) + index * dtype_bytes(stored.index or dtype)


def window_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all window state of one sequence; it does not grow with the sequence."""
    rows = make_plan(config).num_windows * config.sliding_window
    return rows * 2 * _kv_width(config) * dtype_bytes(dtype)


def transformer_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """For comparison: bytes per token of a Transformer of the same sizes, where every layer keeps K and V."""
    return config.num_hidden_layers * 2 * _kv_width(config) * dtype_bytes(dtype)
