"""What a stage begins with and what it may change (paper, section 2.2)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clsa.checkpoint import open_checkpoint
from clsa.config import ModelConfig
from clsa.errors import TrainError
from clsa.params import init_params, tensor_shapes
from clsa.train.config import TrainConfig

_INDEX = (".indexer.q_proj.", ".indexer.k_proj.", ".memory.index_k_proj.")


@dataclass(frozen=True, slots=True)
class Start:
    """The model a stage trains: its config and its weights, flat, float32."""

    model: ModelConfig
    params: Mapping[str, np.ndarray]


def begin(config: TrainConfig, checkpoint: Path | None) -> Start:
    """Fresh weights, or those of the checkpoint, made ready for the stage. Raises TrainError if they do not fit it."""
    if config.model is not None:
        if checkpoint is not None:
            raise TrainError(f"the recipe has a model to train from scratch; leave {checkpoint} or the model out")
        model = ModelConfig.from_dict(config.model)
        params: Mapping[str, np.ndarray] = init_params(model, config.seed)
    elif checkpoint is None:
        raise TrainError(f"stage {config.stage!r} without a model in the recipe needs a checkpoint to start from")
    else:
        opened = open_checkpoint(checkpoint)
        model = opened.config
        params = {name: np.asarray(array, np.float32) for name, array in opened.tensors()}
    if config.stage == "indexer":
        model = with_index(model)
        fresh = init_params(model, config.seed)
        params = {name: params.get(name, fresh[name]) for name in tensor_shapes(model)}
    _check_stage(config, model)
    return Start(model, params)


def with_index(model: ModelConfig) -> ModelConfig:
    """The dense model with one index, which the first layer that reads a memory computes and all others share."""
    pattern = model.index_topk_pattern
    if not pattern or set(pattern) != {"D"}:
        raise TrainError(
            f"stage 'indexer' starts from a dense model (index_topk_pattern all D), got {pattern!r}; "
            f"a model with an index goes on with stage 'joint'"
        )
    return replace(model, index_topk_pattern="F" + "S" * (len(pattern) - 1))


def _check_stage(config: TrainConfig, model: ModelConfig) -> None:
    has_index = "F" in model.index_topk_pattern
    if has_index == (config.stage == "dense"):
        wanted = "without an index (D only)" if config.stage == "dense" else "with an index (stage 'indexer' adds it)"
        raise TrainError(f"stage {config.stage!r} trains a model {wanted}, got {model.index_topk_pattern!r}")
    if model.quantization is not None:
        raise TrainError("quantised weights cannot be trained; start from the unquantised checkpoint")
    if config.seq_len > model.max_position_embeddings:
        raise TrainError(
            f"seq_len ({config.seq_len}) is more than the model's max_position_embeddings "
            f"({model.max_position_embeddings})"
        )


def trainable(config: TrainConfig, model: ModelConfig) -> dict[str, float]:
    """The weights that the stage changes, each with its weight decay."""
    decays: dict[str, float] = {}
    for name, shape in tensor_shapes(model).items():
        if config.stage == "indexer" and not any(part in name for part in _INDEX):
            continue
        decayed = len(shape) > 1 and name != "model.embed_tokens.weight"
        decays[name] = config.weight_decay if decayed else 0.0
    return decays


def digests(params: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, str]:
    """sha256 of the named weights' bytes."""
    return {name: hashlib.sha256(np.ascontiguousarray(params[name]).data).hexdigest() for name in names}


def check_frozen(params: Mapping[str, np.ndarray], before: Mapping[str, str]) -> None:
    """Raise TrainError unless the frozen weights have, bit for bit, the digests they started with."""
    after = digests(params, before)
    if changed := [name for name in before if after[name] != before[name]]:
        raise TrainError(
            f"{len(changed)} frozen tensors changed in training, {changed[0]!r} first; "
            f"this is a bug in the trainer, and the result was not saved"
        )
