"""Every wrong value of a config is a ConfigError of one sentence that names the key."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsa.config import EngineConfig, ModelConfig, Quantization, SamplingParams
from clsa.errors import ConfigError, RequestError

GOOD: dict[str, Any] = {
    "model_type": "clsa",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "cross_attention", "cross_attention"],
    "index_topk_pattern": "FS",
}
HUGE = 10**5000  # more digits than Python prints
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


def test_round_trip() -> None:
    full = GOOD | {"quantization": {"group_size": 64, "bits": 4}, "eos_token_id": [1, 2], "bos_token_id": 0}
    for data in (GOOD, full):
        config = ModelConfig.from_dict(data)
        assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig.from_dict(full).eos_token_ids == (1, 2)
    assert ModelConfig.from_dict(GOOD | {"eos_token_id": 3}).eos_token_ids == (3,)
    assert ModelConfig.from_dict(GOOD).eos_token_ids == ()


WRONG: list[tuple[str, Any]] = [
    ("model_type", "llama"),
    ("model_type", ["clsa"]),
    ("vocab_size", 1),
    ("vocab_size", True),
    ("vocab_size", 64.0),
    ("vocab_size", "64"),
    ("vocab_size", 1 << 80),
    ("vocab_size", HUGE),
    ("vocab_size", -HUGE),
    ("hidden_size", 0),
    ("hidden_size", None),
    ("hidden_size", [16]),
    ("head_dim", 3),
    ("num_key_value_heads", 3),
    ("num_hidden_layers", 10**9),
    ("rms_norm_eps", math.nan),
    ("rms_norm_eps", 0.0),
    ("rms_norm_eps", "1e-6"),
    ("rope_theta", math.inf),
    ("rope_theta", HUGE),
    ("rope_theta", True),
    ("rope_theta", [1e4]),
    ("tie_word_embeddings", 1),
    ("torch_dtype", "float64"),
    ("torch_dtype", ["float32"]),
    ("layer_types", "sliding_attention"),
    ("layer_types", ["sliding_attention"] * 5),
    ("layer_types", ["sliding_attention", {}, [], "cross_attention"]),
    ("layer_types", {"0": "sliding_attention"}),
    ("index_topk_pattern", "F"),
    ("index_topk_pattern", "FX"),
    ("index_topk_pattern", "SF"),
    ("index_topk_pattern", ["F", "S"]),
    ("index_topk_pattern", None),
    ("index_topk", 0),
    ("index_block_size", 3),
    ("bos_token_id", 64),
    ("bos_token_id", -1),
    ("eos_token_id", 64),
    ("eos_token_id", [1, None]),
    ("eos_token_id", [1, True]),
    ("eos_token_id", [[1]]),
    ("eos_token_id", {"a": 1}),
    ("eos_token_id", "1"),
    ("eos_token_id", [0] * 1000),
    ("quantization", 4),
    ("quantization", {"group_size": 64, "bits": 4.0}),
    ("quantization", {"group_size": True}),
    ("quantization", {"bits": [4]}),
    ("quantization", {"bits": 5}),
    ("quantization", {"mode": "mxfp4"}),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: str(type(value).__name__))
def test_wrong_values_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(GOOD | {key: value})
    assert key in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(GOOD))
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        ModelConfig.from_dict({k: v for k, v in GOOD.items() if k != key})


def test_unknown_keys_are_named_but_not_all_of_thousands() -> None:
    with pytest.raises(ConfigError, match="unknown config key 'rope_scaling'"):
        ModelConfig.from_dict(GOOD | {"rope_scaling": None})
    with pytest.raises(ConfigError, match="and 995 more") as caught:
        ModelConfig.from_dict(GOOD | {f"key{i}" * 100: i for i in range(1000)})
    assert len(str(caught.value)) < 600


def test_another_model_is_called_by_its_type_before_its_keys() -> None:
    with pytest.raises(ConfigError, match="model_type must be 'clsa', got 'llama'"):
        ModelConfig.from_dict({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("data", [None, [], "config", 3])
def test_only_an_object_is_a_config(data: Any) -> None:
    with pytest.raises(ConfigError, match="JSON object"):
        ModelConfig.from_dict(data)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ModelConfig.__dataclass_fields__)), JSON)
def test_any_json_value_is_taken_or_refused_as_a_config_error(key: str, value: Any) -> None:
    try:
        config = ModelConfig.from_dict(GOOD | {key: value})
    except ConfigError as error:
        assert len(str(error)) < 600
    else:
        assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "values",
    [
        {"stop": None},
        {"stop": 3},
        {"stop": [3]},
        {"stop": [""]},
        {"stop": ["x"] * 17},
        {"stop_token_ids": 3},
        {"stop_token_ids": ["a"]},
        {"max_tokens": HUGE},
        {"temperature": math.nan},
        {"temperature": HUGE},
        {"top_p": 0},
        {"seed": -1},
        {"logprobs": 21},
    ],
    ids=lambda values: next(iter(values)),
)
def test_wrong_sampling_parameters(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(values))):
        SamplingParams(**values)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="x").stop == ("x",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["x", "y"], stop_token_ids=[1]).stop_token_ids == (1,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [{"max_num_seqs": 0}, {"max_tokens_per_step": 1 << 21}, {"memory_fraction": 1.5}, {"max_model_len": True}],
    ids=str,
)
def test_wrong_engine_values(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        EngineConfig(**values)


def test_what_the_converter_of_mlx_lm_writes_is_accepted() -> None:
    data = {**GOOD, "quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}
    for extra in ({}, {"quantization_config": data["quantization"]}):
        assert ModelConfig.from_dict({**data, **extra}).quantization == Quantization(group_size=64, bits=4)
    with pytest.raises(ConfigError, match="quantization_config"):
        ModelConfig.from_dict({**data, "quantization_config": {"group_size": 32, "bits": 4}})
    with pytest.raises(ConfigError, match="mode must be 'affine'"):
        ModelConfig.from_dict({**data, "quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}})
