"""A tiny model and a corpus that repeats itself, for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clsa.config import ModelConfig
from clsa.params import init_params
from clsa.train.config import TrainConfig

VOCAB = 48
PLANS = {
    "transformer": (["full_attention"] * 3, "DDD"),
    "dsa": (["full_attention"] * 3, "FFF"),
    "indexcache": (["full_attention"] * 4, "FSFS"),
    "yoco": (["sliding_attention"] * 2 + ["cross_attention"] * 2, "DD"),
    "clsa": (["sliding_attention"] * 2 + ["cross_attention"] * 2, "FS"),
}


def model_dict(plan: str = "yoco", **changes: Any) -> dict[str, Any]:
    """config.json of a model with ten thousand weights."""
    layer_types, pattern = PLANS[plan]
    return {
        "model_type": "clsa",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": len(layer_types),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": layer_types,
        "index_topk_pattern": pattern,
        "sliding_window": 5,
        "index_topk": 8,
        "index_head_dim": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    } | changes


def model_config(plan: str = "yoco", **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(model_dict(plan, **changes))


def sharp_params(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Fresh weights, enlarged, so that attention and index prefer some positions clearly."""
    return {n: w * np.float32(6 if w.ndim > 1 else 1) for n, w in init_params(config, seed).items()}


def train_config(stage: str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": stage,
        "seq_len": 24,
        "batch_size": 4,
        "tokens_per_step": 192,
        "steps": 12,
        "learning_rate": 1e-2,
        "log_every": 1,
        "save_dtype": "float32",
    }
    if stage == "dense" and "model" not in changes:
        values["model"] = model_dict()
    return TrainConfig.from_dict(values | changes)


def write_corpus(folder: Path) -> Path:
    """Both splits: documents of 100 tokens that repeat a pattern of 17, and the tokenizer's files."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    pattern = rng.integers(0, VOCAB, 17)
    folder.mkdir(parents=True)
    for name, documents in (("train", 30), ("held_out", 3)):
        tokens = np.concatenate([np.roll(np.resize(pattern, 100), i) for i in range(documents)]).astype(np.uint16)
        offsets = np.arange(0, len(tokens) + 1, 100, dtype=np.int64)
        save_file({"tokens": tokens, "offsets": offsets}, folder / f"{name}.safetensors")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder
