"""The weights of a checkpoint as values: quantised matrices in one piece, on the host or as the model's tree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from clsa.checkpoint import Checkpoint
from clsa.config import FP8, EngineConfig, ModelConfig
from clsa.errors import BackendError, ConfigError
from clsa.ops import Ops, QuantizedWeight
from clsa.params import nest, num_parameters, stored_tensors, tensor_shapes
from clsa.quantization import dequantize


def host_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray | QuantizedWeight]]:
    """Each name of `tensor_shapes` with its weight: views of the mapped files, however those are ordered."""
    how = checkpoint.config.quantization
    stored = stored_tensors(checkpoint.config)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in checkpoint.tensors():
        base, _, part = name.rpartition(".")
        if how is None or f"{base}.scales" not in stored:
            yield name, array
            continue
        found = parts.setdefault(base, {})
        found[part] = array
        if len(found) == 3:
            del parts[base]
            whole = QuantizedWeight(found["weight"], found["scales"], found["biases"], how.group_size, how.bits)
            yield f"{base}.weight", whole


def dense_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Each name of `tensor_shapes` with its numbers: as stored, or float32 where they were quantised."""
    for name, weight in host_weights(checkpoint):
        yield name, dequantize(weight) if isinstance(weight, QuantizedWeight) else weight


def load_weights(ops: Ops, checkpoint: Checkpoint, dtype: str, weight_dtype: str | None = None) -> dict[str, Any]:
    """The tree that the model reads, on the device, as `dtype`; a quantised projection is one leaf.

    `weight_dtype` "fp8" makes a Float8Weight of what `in_float8` names.
    """
    flat = {}
    for name, weight in host_weights(checkpoint):
        if isinstance(weight, QuantizedWeight):
            flat[name] = ops.quantized_weight(weight, dtype)
        else:
            array = ops.asarray(weight, dtype)
            flat[name] = ops.float8_weight(array) if weight_dtype == FP8 and in_float8(name, weight.shape) else array
        # Not left to the first step: a lazy backend would do it in that step's thread, and may not do it in any other.
        ops.evaluate(flat[name])
    return nest(flat)


def in_float8(name: str, shape: tuple[int, ...]) -> bool:
    """Whether "fp8" weights include this tensor: the projections of layers and memory, not embedding, head or norms."""
    return len(shape) == 2 and name not in ("model.embed_tokens.weight", "lm_head.weight")


def check_float8(ops: Ops, config: ModelConfig, engine: EngineConfig) -> None:
    """Raise BackendError or ConfigError if what `engine` wants in 8 bits cannot be had here."""
    wanted = {"memory": engine.kv_dtype or engine.index_dtype, "weights": engine.weight_dtype}
    for what, dtype in wanted.items():
        if dtype is not None and what in ops.no_fp8:
            raise BackendError(ops.no_fp8[what])
    if engine.weight_dtype is not None and config.quantization is not None:
        raise ConfigError(
            f"the weights of this model have {config.quantization.bits} bits already and weight_dtype "
            f"{engine.weight_dtype!r} is made from dense ones; leave it out, or load the model they were made from"
        )


def weight_bytes(ops: Ops, config: ModelConfig, dtype: str, weight_dtype: str | None = None) -> int:
    """Bytes of what `load_weights` puts on the device."""
    if config.quantization is not None and ops.keeps_quantized:
        stored = stored_tensors(config).values()
        return sum(math.prod(shape) * (4 if packed else ops.itemsize(dtype)) for shape, packed in stored)
    if weight_dtype is None:
        return num_parameters(config) * ops.itemsize(dtype)
    num_bytes = 0
    for name, shape in tensor_shapes(config).items():
        if in_float8(name, shape):
            num_bytes += math.prod(shape) * ops.itemsize(FP8) + shape[0] * 4
        else:
            num_bytes += math.prod(shape) * ops.itemsize(dtype)
    return num_bytes
