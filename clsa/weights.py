"""The weights of a checkpoint as values: quantised matrices in one piece, on the host or as the model's tree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from clsa.checkpoint import Checkpoint
from clsa.config import ModelConfig
from clsa.ops import Ops, QuantizedWeight
from clsa.params import nest, num_parameters, stored_tensors
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


def load_weights(ops: Ops, checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """The tree that the model reads, on the device, as `dtype`; a quantised projection is one leaf."""
    flat = {}
    for name, weight in host_weights(checkpoint):
        if isinstance(weight, QuantizedWeight):
            flat[name] = ops.quantized_weight(weight, dtype)
        else:
            flat[name] = ops.asarray(weight, dtype)
    return nest(flat)


def weight_bytes(ops: Ops, config: ModelConfig, dtype: str) -> int:
    """Bytes of what `load_weights` puts on the device."""
    if config.quantization is None or not ops.keeps_quantized:
        return num_parameters(config) * ops.itemsize(dtype)
    return sum(
        math.prod(shape) * (4 if packed else ops.itemsize(dtype)) for shape, packed in stored_tensors(config).values()
    )
