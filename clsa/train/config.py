"""The recipe of one training stage: frozen, bounded, unknown keys refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from clsa.config import MAX_TOKENS, ModelConfig, check_float, check_int, show
from clsa.errors import ConfigError
from clsa.files import MAX_JSON_BYTES, parse_json, read_bounded
from clsa.train.schedule import DECAYS

STAGES = ("dense", "indexer", "joint")
SAVE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One stage (paper, section 2.2). Raises ConfigError, naming the key, on values out of bounds.

    `stage`: "dense" trains everything with dense attention; "indexer" gives a dense model an index and trains that
    alone, by distillation; "joint" trains everything with sparse attention, plus `kd_weight` times the distillation.
    `model` is the config.json of a model trained from scratch; a run that starts from a checkpoint has none.
    A step is `tokens_per_step` tokens, in micro-batches of `batch_size` sequences of `seq_len` tokens.
    `learning_rate` is the peak, reached after `warmup_steps`; `decay` is "constant", "cosine" or "linear" (to zero).
    `weight_decay` is for matrices, but not for the embedding (rows of rare tokens would only shrink) and not for norms.
    `grad_clip` bounds the norm of the gradient. `save_dtype` is that of the finished checkpoint.
    """

    stage: str
    seq_len: int
    batch_size: int
    tokens_per_step: int
    steps: int
    learning_rate: float
    model: Mapping[str, Any] | None = None
    warmup_steps: int = 0
    decay: str = "constant"
    kd_weight: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    seed: int = 0
    save_every: int = 500
    log_every: int = 10
    save_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, allowed in (("stage", STAGES), ("decay", DECAYS), ("save_dtype", SAVE_DTYPES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {show(getattr(self, name))}")
        check_int("seq_len", self.seq_len, 2, MAX_TOKENS)
        check_int("batch_size", self.batch_size, 1, 1 << 16)
        check_int("tokens_per_step", self.tokens_per_step, 1, 1 << 30)
        check_int("steps", self.steps, 1, 1 << 30)
        check_int("warmup_steps", self.warmup_steps, 0, self.steps)
        check_int("seed", self.seed, 0, (1 << 63) - 1)
        check_int("save_every", self.save_every, 1, 1 << 30)
        check_int("log_every", self.log_every, 1, 1 << 30)
        check_float("learning_rate", self.learning_rate, 1e-9, 10.0)
        check_float("kd_weight", self.kd_weight, 1e-6, 1e3)
        check_float("weight_decay", self.weight_decay, 0.0, 10.0)
        check_float("beta1", self.beta1, 0.0, 0.9999)
        check_float("beta2", self.beta2, 0.0, 0.999999)
        check_float("eps", self.eps, 1e-15, 1e-2)
        check_float("grad_clip", self.grad_clip, 1e-6, 1e6)
        if self.tokens_per_step % (self.batch_size * self.seq_len):
            raise ConfigError(
                f"tokens_per_step ({self.tokens_per_step}) must be a multiple of batch_size * seq_len "
                f"({self.batch_size * self.seq_len})"
            )
        if self.model is not None:
            if self.stage != "dense":
                raise ConfigError(f"stage {self.stage!r} starts from a checkpoint, so it takes no model")
            ModelConfig.from_dict(self.model)

    @property
    def micro_batches(self) -> int:
        """How many micro-batches make a step."""
        return self.tokens_per_step // (self.batch_size * self.seq_len)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Build from the parsed JSON object. Unknown and missing keys are refused by name."""
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(str(key) for key in set(data) - set(known)):
            raise ConfigError(f"unknown training config keys: {', '.join(unknown)}; known are {', '.join(known)}")
        if missing := [name for name, f in known.items() if f.default is MISSING and name not in data]:
            raise ConfigError(f"the training config lacks {', '.join(missing)}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_train_config(path: Path) -> TrainConfig:
    """The recipe in a JSON file. Raises ConfigError, or CheckpointError if it cannot be read; both name the file."""
    data = parse_json(read_bounded(path, MAX_JSON_BYTES), str(path))
    try:
        return TrainConfig.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
