"""What is measured: model sizes by name, and the layer plans that are compared at equal sizes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from clsa.config import MAX_TOKENS, ModelConfig, check_int, show
from clsa.errors import RequestError

PLANS = ("transformer", "yoco", "dsa", "indexcache", "clsa")
INDEXCACHE_EVERY = 4  # layers that share one index in the plan "indexcache"

_SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "4b": {  # the paper's sizes; the vocabulary is ours
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 7680,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "sliding_window": 512,
            "index_topk": 2048,
            "index_head_dim": 128,
        },
        "0.2b": {
            "vocab_size": 32768,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "sliding_window": 512,
            "index_topk": 2048,
            "index_head_dim": 128,
            "tie_word_embeddings": True,
        },
        "demo": {  # the bundled model
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 560,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": 128,
            "index_topk": 256,
            "index_head_dim": 64,
            "tie_word_embeddings": True,
        },
        "tiny": {  # for a test of the benchmark itself
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 32,
            "index_topk": 64,
            "index_head_dim": 16,
        },
    }
)
SIZES = tuple(_SIZES)


def plan_config(sizes: str, plan: str, max_tokens: int) -> ModelConfig:
    """The config of a plan at these sizes, for sequences of at most `max_tokens`; it has no end-of-text token.

    Raises RequestError on an unknown name.
    """
    if sizes not in _SIZES:
        raise RequestError(f"sizes must be one of {', '.join(SIZES)}, got {show(sizes)}")
    check_int("the longest sequence", max_tokens, 1, MAX_TOKENS, RequestError)
    layers = _SIZES[sizes]["num_hidden_layers"]
    kinds, pattern = layout(plan, layers)
    return ModelConfig(
        **_SIZES[sizes],
        layer_types=kinds,
        index_topk_pattern=pattern,
        max_position_embeddings=max_tokens,
        rope_theta=5e5 if plan == "transformer" else 1e4,
    )


def layout(plan: str, layers: int) -> tuple[tuple[str, ...], str]:
    """`layer_types` and `index_topk_pattern` of a plan with so many layers."""
    full, half = ("full_attention",) * layers, layers // 2
    shared = ("sliding_attention",) * half + ("cross_attention",) * (layers - half)
    layouts = {
        "transformer": (full, "D" * layers),
        "yoco": (shared, "D" * (layers - half)),
        "dsa": (full, "F" * layers),
        "indexcache": (full, "".join("S" if i % INDEXCACHE_EVERY else "F" for i in range(layers))),
        "clsa": (shared, "F" + "S" * (layers - half - 1)),
    }
    if plan not in layouts:
        raise RequestError(f"plans must be among {', '.join(PLANS)}, got {show(plan)}")
    return layouts[plan]
