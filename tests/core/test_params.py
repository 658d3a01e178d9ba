"""Tensor names, the tree, initialisation, and what weights and state cost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clsa.config import ModelConfig
from clsa.errors import CheckpointError, ConfigError
from clsa.params import (
    flatten,
    init_params,
    nest,
    num_bytes,
    num_parameters,
    state_bytes_per_token,
    tensor_shapes,
    transformer_bytes_per_token,
    window_bytes,
)

S, F, X = "sliding_attention", "full_attention", "cross_attention"
PLANS = {
    "transformer": ((F, F, F, F), "DDDD"),
    "dsa": ((F, F, F, F), "FFFF"),
    "indexcache": ((F, F, F, F), "FSSS"),
    "yoco": ((S, S, X, X), "DD"),
    "clsa": ((S, S, X, X), "FS"),
    "mixture": ((S, F, X, F, X, S), "FDSF"),
}


def make(plan: str, **changes: Any) -> ModelConfig:
    types, pattern = PLANS[plan]
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": len(types),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "index_head_dim": 10,
        "sliding_window": 16,
    }
    return ModelConfig(**(sizes | {"layer_types": types, "index_topk_pattern": pattern} | changes))


def test_the_tensors_of_a_clsa_model() -> None:
    block = {
        "input_layernorm": (8,),
        "self_attn.q_proj": (24, 8),
        "self_attn.o_proj": (8, 24),
        "post_attention_layernorm": (8,),
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
    }
    kv = {
        "self_attn.k_proj": (12, 8),
        "self_attn.v_proj": (12, 8),
        "self_attn.q_norm": (6,),
        "self_attn.k_norm": (6,),
    }
    layers = [block | kv, block | kv, block | {"indexer.q_proj": (10, 8)}, block]
    wanted = {f"model.layers.{i}.{k}.weight": v for i, layer in enumerate(layers) for k, v in layer.items()}
    wanted |= {
        "model.embed_tokens.weight": (32, 8),
        "model.memory.norm.weight": (8,),
        "model.memory.k_proj.weight": (12, 8),
        "model.memory.v_proj.weight": (12, 8),
        "model.memory.index_k_proj.weight": (10, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (32, 8),
    }
    assert tensor_shapes(make("clsa")) == wanted
    del wanted["lm_head.weight"]
    assert tensor_shapes(make("clsa", tie_word_embeddings=True)) == wanted


@pytest.mark.parametrize(
    ("plan", "routed"),
    [
        ("transformer", set()),
        ("dsa", {f"layers.{i}.indexer.{p}_proj" for i in range(4) for p in "qk"}),
        ("indexcache", {"layers.0.indexer.q_proj", "layers.0.indexer.k_proj"}),
        ("yoco", set()),
        ("clsa", {"layers.2.indexer.q_proj", "memory.index_k_proj"}),
        # layers 1 F, 2 D, 3 S, 4 F: the full layer 3 shares a selection, so it has no index of its own
        (
            "mixture",
            {
                "layers.1.indexer.q_proj",
                "layers.1.indexer.k_proj",
                "layers.4.indexer.q_proj",
                "memory.index_k_proj",
            },
        ),
    ],
)
def test_index_tensors_follow_the_pattern(plan: str, routed: set[str]) -> None:
    config = make(plan)
    names = {name.removeprefix("model.").removesuffix(".weight") for name in tensor_shapes(config)}
    assert {name for name in names if "index" in name} == routed
    assert any(name.startswith("memory.") for name in names) == (X in config.layer_types)


@pytest.mark.parametrize("plan", PLANS)
def test_nest_and_flatten_are_inverses(plan: str) -> None:
    config = make(plan)
    flat = {name: object() for name in tensor_shapes(config)}
    tree = nest(flat)
    assert flatten(tree) == flat
    assert nest(flatten(tree)) == tree
    assert len(tree["layers"]) == config.num_hidden_layers
    assert tree["embed_tokens"] is flat["model.embed_tokens.weight"]
    assert tree["lm_head"] is flat["lm_head.weight"]
    assert tree["layers"][1]["self_attn"]["q_proj"] is flat["model.layers.1.self_attn.q_proj.weight"]
    assert tree["layers"][1]["input_layernorm"] is flat["model.layers.1.input_layernorm.weight"]


def test_a_part_of_the_tensors_nests_too() -> None:
    part = {"model.layers.2.indexer.q_proj.weight": 1, "model.memory.index_k_proj.weight": 2}
    assert nest(part) == {"layers": [{}, {}, {"indexer": {"q_proj": 1}}], "memory": {"index_k_proj": 2}}
    assert flatten(nest(part)) == part


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.weight",
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.01.input_layernorm.weight",
        "model.layers.99999999999.input_layernorm.weight",
        "model.layers.0.mlp.weight",
        "model.norm.bias",
        "norm.weight",
        "",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="not the name of a clsa tensor"):
        nest({name: 0})


def test_initial_weights_depend_on_their_name_only() -> None:
    clsa, yoco = init_params(make("clsa"), 3), init_params(make("yoco"), 3)
    assert {k: v.shape for k, v in clsa.items()} == tensor_shapes(make("clsa"))
    assert set(yoco) < set(clsa)
    for name, value in yoco.items():
        np.testing.assert_array_equal(value, clsa[name])
    other = init_params(make("clsa"), 4)
    weights = [name for name in clsa if clsa[name].ndim == 2]
    assert all((clsa[name] != other[name]).any() for name in weights)
    assert (clsa[weights[1]] != init_params(make("clsa"), 3)[weights[1]]).sum() == 0
    assert len({clsa[name].flat[0].item() for name in weights}) == len(weights)


def test_initial_weights_have_the_scales_they_should() -> None:
    config = make("clsa", hidden_size=128, intermediate_size=160, head_dim=32)
    for name, value in init_params(config, 0).items():
        assert value.dtype == np.float32
        if value.ndim == 1:
            assert (value == 1).all()
            continue
        small = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * 4) if small else 0.02
        assert value.std() == pytest.approx(std, rel=0.1)
        assert abs(value.mean()) < std / 5


@pytest.mark.parametrize("seed", [-1, 1 << 63, True, 0.5])
def test_wrong_seeds(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed"):
        init_params(make("clsa"), seed)


def test_what_weights_cost() -> None:
    for config in (make("clsa"), make("dsa"), make("mixture", tie_word_embeddings=True)):
        total = sum(value.size for value in init_params(config, 0).values())
        assert num_parameters(config) == total
        assert num_bytes(config, "float32") == 4 * total
        assert num_bytes(config, "bfloat16") == num_bytes(config, "float16") == 2 * total
    with pytest.raises(ConfigError, match="float64"):
        num_bytes(make("clsa"), "float64")


def test_what_state_costs() -> None:
    kv = 2 * 2 * 6
    assert state_bytes_per_token(make("clsa"), "float32") == 4 * (kv + 10)
    assert state_bytes_per_token(make("yoco"), "bfloat16") == 2 * kv
    assert state_bytes_per_token(make("transformer"), "bfloat16") == 2 * 4 * kv
    assert state_bytes_per_token(make("dsa"), "bfloat16") == 2 * 4 * (kv + 10)
    assert state_bytes_per_token(make("indexcache"), "bfloat16") == 2 * (4 * kv + 10)
    assert state_bytes_per_token(make("mixture"), "bfloat16") == 2 * (3 * kv + 2 * 10)
    assert window_bytes(make("clsa"), "bfloat16") == 2 * 2 * 16 * kv
    assert window_bytes(make("dsa"), "bfloat16") == 0
    assert transformer_bytes_per_token(make("clsa"), "bfloat16") == 2 * 4 * kv
    deep = replace(make("clsa"), num_hidden_layers=8, layer_types=(S,) * 4 + (X,) * 4, index_topk_pattern="FSSS")
    assert state_bytes_per_token(deep, "float32") == state_bytes_per_token(make("clsa"), "float32")
