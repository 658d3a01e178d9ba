"""Configuration: frozen, checked at construction, unknown keys refused.

`ModelConfig` is `config.json` of a checkpoint. `EngineConfig` sizes the engine, `SamplingParams` belongs to
one request. Every integer that comes from outside has an upper bound here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from clsa.errors import ConfigError, RequestError

LAYER_TYPES = ("sliding_attention", "full_attention", "cross_attention")
DTYPES = ("float32", "bfloat16", "float16")
FP8 = "fp8"  # float8 E4M3 "fn", see clsa.float8: for what a switch of EngineConfig names
PAGE_SIZE = 64  # tokens per page of K, V and K_idx
MAX_TOKENS = 1 << 24  # longest context any part of the program accepts

_BOUNDS: dict[str, tuple[int, int]] = {
    "vocab_size": (2, 1 << 22),
    "hidden_size": (1, 1 << 17),
    "intermediate_size": (1, 1 << 19),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (2, 1024),
    "sliding_window": (1, 1 << 20),
    "index_topk": (1, 1 << 17),
    "index_head_dim": (1, 1024),
    "index_block_size": (1, 1 << 12),
    "max_position_embeddings": (1, MAX_TOKENS),
}


def show(value: object) -> str:
    """A short one-line repr for error sentences, whatever the value."""
    try:
        text = repr(value)
    except Exception:  # such as an int of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def check_int(name: str, value: object, low: int, high: int, error: type[Exception] = ConfigError) -> int:
    """Return `value` if it is an int (not a bool) in [low, high]; raise `error` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(f"{name} must be an integer, got {show(value)}")
    if not low <= value <= high:
        raise error(f"{name} must be between {low} and {high}, got {show(value)}")
    return value


def check_float(name: str, value: object, low: float, high: float, error: type[Exception] = ConfigError) -> float:
    """Return `value` as a float if it is a finite number in [low, high]; raise `error` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise error(f"{name} must be a finite number, got {show(value)}")
    if not low <= value <= high:
        raise error(f"{name} must be between {low:g} and {high:g}, got {show(value)}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Group-wise weight quantisation, spelled as mlx-lm writes it."""

    group_size: int = 64
    bits: int = 4

    def __post_init__(self) -> None:
        if check_int("quantization.group_size", self.group_size, 32, 128) not in (32, 64, 128):
            raise ConfigError(f"quantization.group_size must be 32, 64 or 128, got {self.group_size}")
        if check_int("quantization.bits", self.bits, 4, 8) not in (4, 8):
            raise ConfigError(f"quantization.bits must be 4 or 8, got {self.bits}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The architecture of a checkpoint. Raises ConfigError, naming the key, on anything it cannot honour.

    `layer_types` has one entry per layer. `index_topk_pattern` has one letter per layer that reads a memory
    (full and cross layers, in order): F computes a selection, S uses the last one, D attends densely.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    index_topk_pattern: str
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    sliding_window: int = 512
    index_topk: int = 2048
    index_head_dim: int = 128
    index_block_size: int = 1
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131072
    torch_dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    quantization: Quantization | None = None
    model_type: str = "clsa"

    def __post_init__(self) -> None:
        if self.model_type != "clsa":
            raise ConfigError(f"model_type must be 'clsa', got {show(self.model_type)}")
        for name, (low, high) in _BOUNDS.items():
            check_int(name, getattr(self, name), low, high)
        for name, low_float, high_float in (("rms_norm_eps", 1e-12, 1.0), ("rope_theta", 1.0, 1e12)):
            value = check_float(name, getattr(self, name), low_float, high_float)
            object.__setattr__(self, name, value)
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings must be true or false, got {show(self.tie_word_embeddings)}")
        if self.torch_dtype not in DTYPES:
            raise ConfigError(f"torch_dtype must be one of {', '.join(DTYPES)}, got {show(self.torch_dtype)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        self._check_layers()
        self._check_token_ids()

    def _check_layers(self) -> None:
        types, pattern = self.layer_types, self.index_topk_pattern
        if not isinstance(types, (list, tuple)) or len(types) != self.num_hidden_layers:
            got = len(types) if isinstance(types, (list, tuple)) else show(types)
            raise ConfigError(f"layer_types must list {self.num_hidden_layers} layers, got {got}")
        object.__setattr__(self, "layer_types", tuple(types))
        for i, kind in enumerate(types):
            if kind not in LAYER_TYPES:
                raise ConfigError(f"layer_types[{i}] must be one of {', '.join(LAYER_TYPES)}, got {show(kind)}")
        readers = sum(kind != "sliding_attention" for kind in types)
        if not isinstance(pattern, str) or len(pattern) != readers or set(pattern) - set("FSD"):
            raise ConfigError(
                f"index_topk_pattern must be a string of {readers} letters F, S or D, one per full or cross "
                f"layer, got {show(pattern)}"
            )
        if "S" in pattern and pattern.find("S") < (pattern.find("F") if "F" in pattern else len(pattern)):
            raise ConfigError(
                f"index_topk_pattern {show(pattern)} shares a selection (S) before any layer computes one (F)"
            )
        if self.index_topk % self.index_block_size:
            raise ConfigError(
                f"index_topk ({self.index_topk}) must be a multiple of index_block_size ({self.index_block_size})"
            )

    def _check_token_ids(self) -> None:
        eos = self.eos_token_id
        if isinstance(eos, list):
            object.__setattr__(self, "eos_token_id", tuple(eos))
        ids: Iterable[object] = () if eos is None else eos if isinstance(eos, (list, tuple)) else (eos,)
        if isinstance(eos, (list, tuple)) and len(eos) > 256:
            raise ConfigError(f"eos_token_id must be at most 256 ids, got {len(eos)}")
        for name, value in [("bos_token_id", self.bos_token_id), *(("eos_token_id", v) for v in ids)]:
            if value is not None or name == "eos_token_id":
                check_int(name, value, 0, self.vocab_size - 1)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def heads_per_kv(self) -> int:
        """Query heads that read one KV head (the GQA group)."""
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Build from the parsed JSON object. Unknown and missing keys are refused by name."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a model config must be a JSON object, got {type(data).__name__}")
        if (model_type := data.get("model_type")) not in (None, "clsa"):
            raise ConfigError(f"model_type must be 'clsa', got {show(model_type)}")
        values = dict(data)
        if "quantization_config" in values and values["quantization_config"] == values.get("quantization"):
            del values["quantization_config"]  # mlx-lm's converter writes the same thing under both names
        if unknown := sorted(show(k) for k in set(values) - {f.name for f in fields(cls)}):
            names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            raise ConfigError(f"unknown config key {names}; remove it or check its spelling")
        required = {f.name for f in fields(cls) if _is_required(f)} | {"model_type"}
        if missing := sorted(required - set(data)):
            raise ConfigError(f"config key {', '.join(map(repr, missing))} is missing")
        if (quantization := values.get("quantization")) is not None:
            values["quantization"] = _quantization(quantization)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `config.json`; `from_dict` gives the same config back."""
        data: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.name in ("quantization", "bos_token_id", "eos_token_id"):
                continue
            if isinstance(value, Quantization):
                value = {"group_size": value.group_size, "bits": value.bits}
            data[f.name] = list(value) if isinstance(value, tuple) else value
        return data


def _is_required(f: Any) -> bool:
    from dataclasses import MISSING

    return f.default is MISSING and f.default_factory is MISSING


def _quantization(data: object) -> Quantization:
    if not isinstance(data, Mapping) or set(data) - {"group_size", "bits", "mode"}:
        raise ConfigError(f"quantization must be an object with group_size and bits, got {show(data)}")
    if data.get("mode", "affine") != "affine":  # mlx-lm names the one mode that scales and biases are
        raise ConfigError(f"quantization.mode must be 'affine', got {show(data['mode'])}; convert the model again")
    return Quantization(**{key: value for key, value in data.items() if key != "mode"})


@dataclass(frozen=True, slots=True)
class MemoryDtypes:
    """What memories keep their rows in: None is the dtype of the model, "fp8" one byte a number (`clsa.float8`)."""

    kv: str | None = None  # K and V
    index: str | None = None  # K_idx


MODEL_DTYPE = MemoryDtypes()  # all in the dtype of the model


_LARGEST = {  # of an engine's sizes that None leaves to it
    "max_num_seqs": 4096,
    "max_tokens_per_step": 1 << 20,
    "max_tokens_in_memory": 1 << 32,
    "max_model_len": MAX_TOKENS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine holds and does at once, and what it keeps in 8 bits.

    `max_num_seqs`: sequences that run together. `max_tokens_per_step`: tokens (prefill and decode) of one step. None
    takes what the device works best with (`clsa info` shows it): 256 and 8192 on an NVIDIA GPU, 32 and 2048 elsewhere,
    halved as often as it takes to leave three quarters of the memory beside the weights to contexts.
    `max_tokens_in_memory`: capacity of the paged memory in tokens; None sizes it from one sequence of `max_model_len`
    per running request within `memory_fraction` of the free memory. `max_model_len`: longest prompt + answer; None
    takes the model's `max_position_embeddings`.

    `kv_dtype` and `index_dtype`: K and V, and index keys, of the paged memory; `weight_dtype`: the projections of
    the layers. None is the dtype of the model, "fp8" float8 E4M3. Windows, embedding, head and norms stay as they are.
    """

    max_num_seqs: int | None = None
    max_tokens_per_step: int | None = None
    max_tokens_in_memory: int | None = None
    max_model_len: int | None = None
    memory_fraction: float = 0.6
    max_waiting: int = 100_000
    prefix_cache_bytes: int = 1 << 30
    kv_dtype: str | None = None
    index_dtype: str | None = None
    weight_dtype: str | None = None

    def __post_init__(self) -> None:
        check_int("max_waiting", self.max_waiting, 1, 1 << 24)
        check_int("prefix_cache_bytes", self.prefix_cache_bytes, 0, 1 << 44)
        check_float("memory_fraction", self.memory_fraction, 0.01, 0.95)
        for name, most in _LARGEST.items():
            if (value := getattr(self, name)) is not None:
                check_int(name, value, 1, most)
        for name in ("kv_dtype", "index_dtype", "weight_dtype"):
            if (value := getattr(self, name)) not in (None, FP8):
                raise ConfigError(f"{name} must be None or {FP8!r}, got {show(value)}")

    @property
    def memory_dtypes(self) -> MemoryDtypes:
        return MemoryDtypes(self.kv_dtype, self.index_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled and when it ends. Raises RequestError on values out of bounds.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `repetition_penalty` divides
    positive and multiplies negative logits of tokens in prompt and answer. `logprobs` n returns the chosen token's
    and the n best tokens' log-probabilities (of the unmodified distribution). The same `seed` gives the same text
    whatever else runs. `stop` strings end the text before them; `stop_token_ids` are not part of the text.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = field(default=())
    stop_token_ids: tuple[int, ...] = field(default=())
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS, RequestError)
        check_float("temperature", self.temperature, 0.0, 100.0, RequestError)
        check_int("top_k", self.top_k, 0, 1 << 22, RequestError)
        check_float("top_p", self.top_p, 1e-6, 1.0, RequestError)
        check_float("min_p", self.min_p, 0.0, 1.0, RequestError)
        check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0, RequestError)
        check_int("seed", self.seed, 0, (1 << 63) - 1, RequestError)
        if self.logprobs is not None:
            check_int("logprobs", self.logprobs, 0, 20, RequestError)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if not isinstance(value, (list, tuple)):
                raise RequestError(f"{name} must be a list, got {show(value)}")
            object.__setattr__(self, name, tuple(value))
        if len(stop) > 16 or any(not isinstance(s, str) or not 1 <= len(s) <= 1024 for s in stop):
            raise RequestError("stop must be at most 16 strings of 1 to 1024 characters")
        if len(self.stop_token_ids) > 256:
            raise RequestError(f"stop_token_ids must be at most 256 ids, got {len(self.stop_token_ids)}")
        for token in self.stop_token_ids:
            check_int("stop_token_ids", token, 0, 1 << 22, RequestError)
