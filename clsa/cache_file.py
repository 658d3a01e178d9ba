"""A prefix in one safetensors file, bound to the model, backend, dtype and salt that it was computed with.

Metadata: `format`; `model`, see `clsa.model_hash`; `backend`; `dtype`; `kv_dtype`, `index_dtype` and `weight_dtype`
where they are "fp8"; `salt`, as a hash, because a salt may be a secret. Tensors: `tokens` [n] (uint32) and what
`prefix_shapes` names, in `dtype` or as F8_E4M3.

Another backend rounds otherwise, and where scores tie (the same token twice) the last bit decides what is selected: a
prefix of mixed origin would not be exact. So a file belongs to a backend, and to one that keeps its state in `dtype`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clsa.config import PAGE_SIZE, MemoryDtypes, show
from clsa.errors import CheckpointError, RequestError
from clsa.model_hash import ModelHash
from clsa.ops import Ops
from clsa.params import dtype_bytes
from clsa.plan import Plan
from clsa.prefix_state import PrefixState, prefix_shapes
from clsa.tensor_file import FLOAT_DTYPES, PACKED, TensorEntry, is_finite, map_tensors, read_entries, read_metadata

FORMAT = "clsa-prefix-1"
_SWITCHES = ("kv_dtype", "index_dtype", "weight_dtype")  # of EngineConfig


def cache_metadata(
    model: ModelHash, ops: Ops, dtype: str, stored: MemoryDtypes, weight_dtype: str | None, salt: str
) -> dict[str, str]:
    """What a file must say so that its state may be used.

    Raises RequestError if this backend keeps its state in another precision, CheckpointError as `ModelHash.hex` does.
    """
    if ops.itemsize(dtype) != dtype_bytes(dtype):
        raise RequestError(f"backend {ops.name!r} keeps no {dtype} state, and a cache file would round it; use another")
    hidden = hashlib.sha256(b"clsa salt " + salt.encode("utf-8", "surrogatepass")).hexdigest()
    switches = zip(_SWITCHES, (stored.kv, stored.index, weight_dtype), strict=True)
    known = {"format": FORMAT, "model": model.hex(), "backend": ops.name, "dtype": dtype, "salt": hidden}
    return known | {name: value for name, value in switches if value is not None}


def cache_key(tokens: Sequence[int], metadata: Mapping[str, str]) -> str:
    """64 hex digits for the state of the whole pages of `tokens`: the same for the same `metadata` and pages."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    digest.update(np.array(tokens[: len(tokens) // PAGE_SIZE * PAGE_SIZE], np.uint32).tobytes())
    return digest.hexdigest()


def write_cache(path: Path, prefix: PrefixState, metadata: Mapping[str, str]) -> None:
    """Write a prefix; a file that was there is replaced when the new one is whole."""
    from safetensors.numpy import save_file

    tensors = {
        name: np.ascontiguousarray(array, FLOAT_DTYPES[_stored_dtype(name, metadata)])
        for name, array in prefix.arrays.items()
    }
    for name, array in tensors.items():
        if not is_finite(array):
            raise CheckpointError(f"the state of this prompt ({name}) holds NaN or infinity; it was not saved")
    tensors["tokens"] = np.array(prefix.tokens, np.uint32)
    try:
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".saving-") as folder:
            new = Path(folder) / path.name
            save_file(tensors, new, dict(metadata))
            with new.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def read_cache(path: Path, plan: Plan, metadata: Mapping[str, str], max_tokens: int) -> PrefixState:
    """The prefix in a file, its arrays mapped from it.

    Raises CheckpointError, before any number is read, unless the file is whole and says `metadata`, and its tensors
    are those of a prefix of at most `max_tokens`; and on tokens and numbers that cannot be.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; give one that save_cache has written")
    found, entries = read_metadata(path, path), read_entries(path, path, (*FLOAT_DTYPES, PACKED))
    _check_metadata(path, found, metadata)
    num_tokens = _check_entries(path, entries, plan, metadata, max_tokens)
    arrays = dict(map_tensors(entries))
    tokens = arrays.pop("tokens")
    if tokens.max() >= plan.config.vocab_size:
        raise CheckpointError(f"{path} holds the token {tokens.max()}, the vocabulary has {plan.config.vocab_size}")
    for name, array in arrays.items():
        if not is_finite(array):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; the file is damaged, write it again")
    assert len(tokens) == num_tokens
    return PrefixState(tokens.tolist(), arrays)


def _check_metadata(path: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no prefix (its format is {show(found.get('format'))}, not {FORMAT!r})")
    if found.get("model") != wanted["model"]:
        raise CheckpointError(f"{path} was written by another model; load that model, or save the prompt again")
    if found.get("backend") != wanted["backend"]:
        raise CheckpointError(
            f"{path} holds state of backend {show(found.get('backend'))}, this is {wanted['backend']!r}; "
            "use that backend, or save the prompt again"
        )
    if found.get("dtype") != wanted["dtype"]:
        raise CheckpointError(
            f"{path} holds state in {show(found.get('dtype'))}, this model runs in {wanted['dtype']!r}; "
            "load the model with that dtype, or save the prompt again"
        )
    for name in _SWITCHES:
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{path} was written with {name} {show(found.get(name))}, this model runs with "
                f"{wanted.get(name)!r}; load the model with that {name}, or save the prompt again"
            )
    if found.get("salt") != wanted["salt"]:
        raise CheckpointError(f"{path} was written with another salt; give the same one")


def _check_entries(
    path: Path, entries: list[TensorEntry], plan: Plan, metadata: Mapping[str, str], max_tokens: int
) -> int:
    tokens = next((entry for entry in entries if entry.name == "tokens"), None)
    num_tokens = tokens.shape[0] if tokens is not None and len(tokens.shape) == 1 else 0
    if not num_tokens or num_tokens % PAGE_SIZE or num_tokens > max_tokens:
        raise CheckpointError(
            f"{path} must hold whole pages of {PAGE_SIZE} tokens, at most {max_tokens} of them, got {num_tokens}"
        )
    wanted = {name: (_stored_dtype(name, metadata), shape) for name, shape in prefix_shapes(plan, num_tokens).items()}
    wanted["tokens"] = (PACKED, (num_tokens,))
    found = {entry.name: (entry.dtype, entry.shape) for entry in entries}
    if found != wanted:
        name = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise CheckpointError(
            f"{path}: tensor {show(name)} is {show(found.get(name))} where this model keeps {show(wanted.get(name))}; "
            "save the prompt again"
        )
    return num_tokens


def _stored_dtype(name: str, metadata: Mapping[str, str]) -> str:
    """What the file calls the dtype of this tensor: windows are never in 8 bits."""
    if name.startswith("memory.") and ("index_dtype" if name.endswith(".k_idx") else "kv_dtype") in metadata:
        return "F8_E4M3"
    return next(stored for stored, dtype in FLOAT_DTYPES.items() if dtype.name == metadata["dtype"])
