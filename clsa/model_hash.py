"""What a model is, in one number: a hash over its config and every byte of its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clsa.checkpoint import Checkpoint
from clsa.errors import CheckpointError

_THREADS = 8


class ModelHash:
    """Computed when it is first asked for, then kept: it reads all weights, about a second per 2 GB and core."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Note what the files are like now; they must be the same when the hash is computed."""
        self._checkpoint = checkpoint
        self._stamps = _stamps(checkpoint)
        self._hex: str | None = None

    def hex(self) -> str:
        """sha256 as 64 hex digits. Raises CheckpointError if the files have changed since the model was loaded."""
        if self._hex is None:
            value = _hash(self._checkpoint)
            if _stamps(self._checkpoint) != self._stamps:
                raise CheckpointError(f"{self._checkpoint.folder} changed after it was loaded; load the model again")
            self._hex = value
        return self._hex


def _hash(checkpoint: Checkpoint) -> str:
    # One hash per tensor, so that cores can share the work, and shards and their order do not matter.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        names, arrays = zip(*checkpoint.tensors(), strict=True)
        tensors = dict(zip(names, pool.map(_tensor_hash, arrays), strict=True))
    text = json.dumps({"config": checkpoint.config.to_dict(), "tensors": tensors}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor_hash(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _stamps(checkpoint: Checkpoint) -> Mapping[Path, tuple[int, int, int]]:
    stamps = {}
    for file in {entry.file for entry in checkpoint.entries}:
        try:
            stat = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
        stamps[file] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return stamps
