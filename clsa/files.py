"""Files from outside, read with care: bounded, regular, inside their folder; JSON without double keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clsa.config import show
from clsa.errors import CheckpointError

MAX_JSON_BYTES = 1 << 24


def locate(folder: Path, name: str) -> Path | None:
    """The regular file `name` of `folder` with links followed, or None if there is none.

    Raises CheckpointError if it is something else than a file, or a link that leaves the folder. The Hugging Face
    cache keeps its files as links from `snapshots/<revision>` to `blobs` of the same repository: those are followed.
    """
    path = folder / name
    try:
        if not path.is_symlink() and not path.exists():
            return None
        root, target = folder.resolve(), path.resolve()
        allowed = [root]
        if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
            allowed.append(root.parent.parent / "blobs")
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(f"{path} is a link out of its folder (to {target}); put the file itself there")
        if not target.is_file():
            raise CheckpointError(f"{path} is not a regular file; put the file itself there")
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return target


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes. Raises CheckpointError on larger and unreadable ones."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size > limit:
                raise CheckpointError(f"{path} has {size} bytes; at most {limit} are read of such a file")
            file.seek(0)
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises CheckpointError on anything else, double keys and NaN included."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {show(key)} occurs twice")
            result[key] = value
        return result

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON value")

    try:
        value = json.loads(data, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise CheckpointError(f"{where} is not valid JSON: nested too deeply") from None
    except ValueError as error:  # also bad UTF-8, and integers of thousands of digits
        raise CheckpointError(f"{where} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object, got {show(value)}")
    return value


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in file `name` of `folder`, or None if there is no such file."""
    path = locate(folder, name)
    return None if path is None else parse_json(read_bounded(path, MAX_JSON_BYTES), str(folder / name))
