"""Checkpoints: a folder with config.json and model*.safetensors, as Hugging Face lays it out.

Opening one reads JSON and safetensors headers only and checks everything against the config; no tensor data is
touched before `Checkpoint.tensors`. Python files, pickles and hooks are never read. Saving one puts config.json
last, so that whatever can be opened is whole.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from clsa.config import ModelConfig, show
from clsa.errors import CheckpointError, ConfigError
from clsa.files import locate, read_bounded, read_json
from clsa.params import StoredTensor, stored_tensors
from clsa.tensor_file import NUMPY_DTYPES, PACKED, TensorEntry, is_finite, map_tensors, read_entries

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_SHARD_BYTES = 4 << 30
MAX_TOKENIZER_BYTES = 1 << 28
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_OWN_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_CODE_HOOKS = ("auto_map", "custom_pipelines", "trust_remote_code", "custom_object_save")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that matches its config. `entries` are in the order of the files and their data."""

    folder: Path
    config: ModelConfig
    entries: tuple[TensorEntry, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return sum(entry.nbytes for entry in self.entries)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each name with what is stored: a read-only view of the mapped file (float32, float16, bfloat16 or uint32).

        Raises CheckpointError, naming the tensor, on a number that is not finite.
        """
        for _, entries in groupby(self.entries, key=lambda entry: entry.file):
            for name, array in map_tensors(list(entries)):
                if array.dtype != np.uint32 and not is_finite(array):
                    raise CheckpointError(
                        f"{self.folder}: tensor {name!r} holds NaN or infinity; the weights are damaged"
                    )
                yield name, array


def read_config(folder: Path) -> ModelConfig:
    """The config of a checkpoint, with the end-of-sequence ids of generation_config.json where that has some.

    Raises ConfigError on values it cannot honour and CheckpointError on files it cannot read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give the folder that holds config.json")
    where = folder / CONFIG_FILE
    data = read_json(folder, CONFIG_FILE)
    if data is None:
        raise CheckpointError(f"{folder} has no config.json; give the folder of a clsa checkpoint")
    refuse_code_hooks(data, where)
    try:
        config = ModelConfig.from_dict(data)
        where = folder / GENERATION_FILE
        eos = (read_json(folder, where.name) or {}).get("eos_token_id")
        return config if eos is None else replace(config, eos_token_id=eos)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def refuse_code_hooks(data: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError if a JSON file asks for code to be run."""
    for key in _CODE_HOOKS:
        if key in data:
            raise CheckpointError(f"{where} asks to run code ({key}), which clsa never does; remove that key")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint completely without reading or allocating weights.

    Raises ConfigError on values of config.json, CheckpointError on everything else that is wrong: missing, damaged
    or pickled files, links out of the folder, and tensors that the config does not call for.
    """
    config = read_config(folder)
    single, index = locate(folder, SINGLE_FILE), read_json(folder, INDEX_FILE)
    if single is not None and index is not None:
        raise CheckpointError(f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}; remove the stale one")
    if single is not None:
        entries = read_entries(single, folder / SINGLE_FILE)
    elif index is not None:
        entries = _read_shards(folder, index, config)
    else:
        raise CheckpointError(_no_weights(folder))
    check_tensors({e.name: StoredTensor(e.shape, e.dtype == PACKED) for e in entries}, config, str(folder))
    return Checkpoint(folder, config, tuple(entries))


def check_tensors(found: Mapping[str, StoredTensor], config: ModelConfig, where: str) -> None:
    """Raise CheckpointError unless these are exactly the tensors that a checkpoint of `config` holds."""
    wanted = stored_tensors(config)
    _check_names(found, wanted, where)
    for name, (shape, packed) in wanted.items():
        if found[name].packed != packed:
            kinds = ("floating-point numbers", "packed integers (U32)")
            raise CheckpointError(
                f"{where}: tensor {name!r} holds {kinds[not packed]} where the config needs {kinds[packed]}"
            )
        if found[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {list(found[name].shape)} where the config needs {list(shape)}"
            )


def _check_names(found: Iterable[str], wanted: Mapping[str, object], where: str) -> None:
    found = set(found)
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{where} lacks {_names(missing)}, which the config calls for")
    if extra := sorted(found - set(wanted)):
        raise CheckpointError(f"{where} has {_names(extra)}, which the config does not call for")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ("tensor " if len(names) == 1 else "tensors ") + ", ".join(map(show, names[:4])) + more


def _read_shards(folder: Path, index: Mapping[str, Any], config: ModelConfig) -> list[TensorEntry]:
    where, weight_map = folder / INDEX_FILE, index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} must have a weight_map from tensors to files, got {show(weight_map)}")
    for shard in weight_map.values():
        if isinstance(shard, str) and shard.endswith(PICKLES):
            raise CheckpointError(f"{where} names pickle weights ({shard}); convert them to safetensors")
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{where} names the file {show(shard)}; only safetensors files beside the index are read"
            )
    _check_names(weight_map, stored_tensors(config), str(where))
    entries: list[TensorEntry] = []
    for shard in dict.fromkeys(weight_map.values()):
        file = locate(folder, shard)
        if file is None:
            raise CheckpointError(f"{folder / shard} is missing, though {INDEX_FILE} names it; fetch it again")
        found = read_entries(file, folder / shard)
        if {entry.name for entry in found} != {name for name, place in weight_map.items() if place == shard}:
            raise CheckpointError(f"{folder / shard} holds other tensors than {INDEX_FILE} says; fetch it again")
        entries += found
    return entries


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLES))
    if pickles:
        return f"{folder} has only pickle weights ({show(pickles[0])[1:-1]}); convert them to safetensors"
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; the weights are missing"


def save_checkpoint(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str | None = None,
    tokenizer_files: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """Write a checkpoint into `folder`, creating it where needed.

    Args: `tensors` flat, as `stored_tensors` names them: float32, float16 or bfloat16 ones are stored as `dtype`
    (None: `config.torch_dtype`), and the stored config says so; uint32 ones as they are. `tokenizer_files` are copied
    beside them; see `find_tokenizer_files`. `overwrite` replaces a clsa checkpoint; other files of the folder are left
    alone.

    Raises CheckpointError before anything is written if tensors and config do not match or the folder holds
    something else, and on numbers that are not finite in `dtype`. An existing checkpoint stays until all new
    files are written.
    """
    config = replace(config, torch_dtype=dtype or config.torch_dtype)
    found = {name: StoredTensor(tuple(array.shape), array.dtype == np.uint32) for name, array in tensors.items()}
    check_tensors(found, config, "the model to save")
    copies = _read_tokenizer_files(tokenizer_files)
    check_target(folder, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            stage = Path(temporary)
            _write_weights(stage, tensors, config.torch_dtype)
            for name, data in copies.items():
                (stage / name).write_bytes(data)
            (stage / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
            _put_in_place(stage, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from None


def find_tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files that a folder has, links followed."""
    return [folder / name for name in TOKENIZER_FILES if locate(folder, name) is not None]


def _read_tokenizer_files(paths: Iterable[Path]) -> dict[str, bytes]:
    copies: dict[str, bytes] = {}
    for path in paths:
        if path.name not in TOKENIZER_FILES:
            raise CheckpointError(f"{path} is no tokenizer file; these are {', '.join(TOKENIZER_FILES)}")
        copies[path.name] = read_bounded(path, MAX_TOKENIZER_BYTES)
    return copies


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless a checkpoint may be saved into `folder`; see `save_checkpoint`."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder to save into")
    ours = {CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES}
    taken = sorted(p.name for p in folder.iterdir() if p.name in ours or _OWN_WEIGHTS.fullmatch(p.name))
    if not taken:
        return
    if not overwrite:
        raise CheckpointError(f"{folder} already holds {taken[0]}; choose another folder or allow overwriting")
    data = read_json(folder, CONFIG_FILE)
    if data is None or data.get("model_type") != "clsa":
        raise CheckpointError(f"{folder} holds {taken[0]} but no clsa checkpoint; choose another folder")


def _write_weights(stage: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    target = next(d for d in NUMPY_DTYPES.values() if d.name == dtype)
    sizes = {n: a.size * (a.itemsize if a.dtype == np.uint32 else target.itemsize) for n, a in tensors.items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        try:
            save_file({name: _stored(name, tensors[name], target) for name in names}, stage / file)
        except SafetensorError as error:
            raise OSError(f"{file}: {error}") from None
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (stage / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stored(name: str, array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if array.dtype == np.uint32:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):  # an overflow becomes infinity, and that is refused
        stored = np.ascontiguousarray(array, dtype)
    if not is_finite(stored):
        raise CheckpointError(f"tensor {name!r} holds NaN, or numbers beyond {dtype.name}; it was not saved")
    return stored


def _put_in_place(stage: Path, folder: Path) -> None:
    """Move the new files in. While a mixture of old and new could be opened, there is no config.json."""
    new = {path.name for path in stage.iterdir()}
    for name in new:
        with (stage / name).open("rb") as file:
            os.fsync(file.fileno())
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if path.name == GENERATION_FILE or (_OWN_WEIGHTS.fullmatch(path.name) and path.name not in new):
            path.unlink()
    for name in [*sorted(new - {CONFIG_FILE}), CONFIG_FILE]:
        os.replace(stage / name, folder / name)
