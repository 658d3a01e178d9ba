"""Writing a checkpoint anew: quantised, dequantised, or in another dtype. Needs no backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from clsa.checkpoint import Checkpoint, check_target, find_tokenizer_files, open_checkpoint, save_checkpoint
from clsa.config import ModelConfig, Quantization
from clsa.errors import CheckpointError
from clsa.params import stored_tensors
from clsa.quantization import quantize
from clsa.tensor_file import NUMPY_DTYPES
from clsa.weights import dense_weights


def convert(
    source: Path,
    out: Path,
    *,
    quantization: Quantization | None = None,
    dtype: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """Write the checkpoint of the folder `source` into the folder `out`, tokenizer files too, and open it.

    Args: `quantization` of the matrices that `stored_tensors` packs, rounded to `dtype` before; None writes all of
    them as floating point, also those that were quantised. `dtype` of what is not packed; None keeps the source's.

    Raises CheckpointError or ConfigError, before anything is read at length, if the source is damaged or quantised
    already, if no matrix has rows of whole groups, or if `out` holds something; CheckpointError, and leaves no
    checkpoint, on numbers beyond `dtype`.
    """
    checkpoint = open_checkpoint(source)
    config = replace(checkpoint.config, quantization=quantization, torch_dtype=dtype or checkpoint.config.torch_dtype)
    if quantization is not None:
        _check_quantization(source, checkpoint.config, config, quantization)
    check_target(out, overwrite=False)
    tensors: dict[str, np.ndarray] = {}
    stored = stored_tensors(config)
    target = next(d for d in NUMPY_DTYPES.values() if d.name == config.torch_dtype)
    for name, weight in dense_weights(checkpoint):
        if quantization is not None and stored[name].packed:
            report(f"quantising {name}")
            tensors |= _quantized(name, _rounded(weight, target), quantization)
        elif checkpoint.config.quantization is not None:
            tensors[name] = _rounded(weight, target)  # the float32 copy of a whole model would be large
        else:
            tensors[name] = weight
    save_checkpoint(out, config, tensors, tokenizer_files=find_tokenizer_files(source))
    return open_checkpoint(out)


def _check_quantization(source: Path, old: ModelConfig, new: ModelConfig, how: Quantization) -> None:
    if old.quantization is not None:
        raise CheckpointError(
            f"{source} is quantised already ({old.quantization.bits} bits); convert the checkpoint it was made from"
        )
    if not any(tensor.packed for tensor in stored_tensors(new).values()):
        raise CheckpointError(
            f"{source} has no matrix whose rows are a multiple of {how.group_size}; choose a smaller group size"
        )


def _rounded(weight: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinity is refused when it is saved
        return weight.astype(dtype, copy=False)


def _quantized(name: str, weight: np.ndarray, how: Quantization) -> dict[str, np.ndarray]:
    base, q = name.removesuffix("weight"), quantize(weight, how)
    return {name: q.packed, f"{base}scales": q.scales, f"{base}biases": q.biases}
