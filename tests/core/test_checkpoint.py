"""What is saved is loaded again, and saving never leaves a mixture or takes what is not its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from clsa import checkpoint as checkpoint_module
from clsa.checkpoint import find_tokenizer_files, open_checkpoint, save_checkpoint
from clsa.errors import CheckpointError, ConfigError
from clsa.params import init_params, num_bytes, tensor_shapes
from tests.core.checkpoints import (
    CONFIG,
    HEAD,
    INDEX,
    PARAMS,
    edit_header,
    folder,
    loaded,
    refused,
    sharded,
    write_raw,
)

__all__ = ["folder", "sharded"]  # fixtures


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    save_checkpoint(tmp_path / "m", CONFIG, PARAMS, dtype=dtype)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config == replace(CONFIG, torch_dtype=dtype)
    assert checkpoint.num_bytes == num_bytes(CONFIG, dtype)
    tensors = dict(checkpoint.tensors())
    assert set(tensors) == set(PARAMS)
    for name, value in tensors.items():
        assert value.dtype.name == dtype
        np.testing.assert_array_equal(value, PARAMS[name].astype(value.dtype))
        assert not value.flags.writeable


def test_dtype_is_the_configs_unless_given(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", replace(CONFIG, torch_dtype="bfloat16"), PARAMS)
    assert {value.dtype for value in loaded(tmp_path / "m").values()} == {np.dtype(ml_dtypes.bfloat16)}
    with pytest.raises(ConfigError, match="int8"):
        save_checkpoint(tmp_path / "n", CONFIG, PARAMS, dtype="int8")
    assert not (tmp_path / "n").exists()


def test_strided_and_reversed_arrays_are_saved_as_they_look(tmp_path: Path) -> None:
    views = {name: value.T.copy().T if value.ndim == 2 else value[::-1] for name, value in PARAMS.items()}
    save_checkpoint(tmp_path / "m", CONFIG, views)
    for name, value in loaded(tmp_path / "m").items():
        np.testing.assert_array_equal(value, views[name])


def test_shards_hold_the_same(sharded: Path) -> None:
    assert not (sharded / "model.safetensors").exists()
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    assert json.loads((sharded / INDEX).read_text())["metadata"]["total_size"] == num_bytes(CONFIG, "float32")
    for name, value in loaded(sharded).items():
        np.testing.assert_array_equal(value, PARAMS[name])


def test_unaligned_data_is_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    edit_header(path, lambda header: header.update(__metadata__={"format": "pt"}))
    for pad in range(4):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        write_raw(path, raw[8 : 8 + length] + b" " * pad, raw[8 + length :])
        for name, value in loaded(folder).items():
            np.testing.assert_array_equal(value, PARAMS[name])


def test_generation_config_overrides_the_end_of_sequence(folder: Path) -> None:
    other = folder / "generation_config.json"
    other.write_text('{"eos_token_id": [2, 3], "temperature": 0.6, "transformers_version": "5"}')
    assert open_checkpoint(folder).config.eos_token_ids == (2, 3)
    other.write_text('{"do_sample": true, "eos_token_id": null}')
    assert open_checkpoint(folder).config.eos_token_ids == (1,)
    other.write_text('{"eos_token_id": 32}')
    refused(folder, r"generation_config.json: eos_token_id must be between 0 and 31, got 32", ConfigError)


def test_other_files_are_never_read(folder: Path) -> None:
    (folder / "modeling_clsa.py").mkdir()
    (folder / "optimizer.safetensors").write_bytes(b"rubbish")
    (folder / "pytorch_model.bin").write_bytes(b"rubbish")
    assert set(loaded(folder)) == set(PARAMS)


def test_hub_caches_link_to_their_blobs(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        (repo / "blobs" / f"blob{i}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    assert set(loaded(snapshot)) == set(PARAMS)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    refused(snapshot, "is a link out of its folder")


# -- saving -----------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_checks_first(tmp_path: Path) -> None:
    target = tmp_path / "m"
    for tensors, match in (
        ({k: v for k, v in PARAMS.items() if k != HEAD}, "the model to save lacks tensor 'lm_head.weight'"),
        (PARAMS | {"extra": PARAMS[HEAD]}, "has tensor 'extra'"),
        (PARAMS | {HEAD: PARAMS[HEAD].T}, r"has shape \[8, 32\]"),
    ):
        with pytest.raises(CheckpointError, match=match):
            save_checkpoint(target, CONFIG, tensors)
    with pytest.raises(CheckpointError, match="no tokenizer file"):
        save_checkpoint(target, CONFIG, PARAMS, tokenizer_files=[tmp_path / "model.py"])
    with pytest.raises(CheckpointError, match="cannot be read"):
        save_checkpoint(target, CONFIG, PARAMS, tokenizer_files=[tmp_path / "tokenizer.json"])
    assert not target.exists()


def test_saving_never_overwrites_unasked(folder: Path, tmp_path: Path) -> None:
    before = snapshot(folder)
    with pytest.raises(CheckpointError, match=r"already holds config.json"):
        save_checkpoint(folder, CONFIG, PARAMS)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(tmp_path / "file", CONFIG, PARAMS, overwrite=True)
    assert snapshot(folder) == before


@pytest.mark.parametrize("config", ['{"model_type": "llama"}', None])
def test_saving_overwrites_clsa_checkpoints_only(tmp_path: Path, config: str | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="no clsa checkpoint"):
        save_checkpoint(tmp_path, CONFIG, PARAMS, overwrite=True)
    assert snapshot(tmp_path) == before


def test_overwriting_leaves_nothing_stale(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (sharded / "generation_config.json").write_text('{"eos_token_id": 7}')
    (sharded / "metrics.jsonl").write_text("{}")
    (sharded / "tokenizer.json").write_text("{}")
    mapped = dict(open_checkpoint(sharded).tensors())
    new = init_params(CONFIG, 1)
    files = find_tokenizer_files(sharded)
    save_checkpoint(sharded, CONFIG, new, tokenizer_files=files, overwrite=True)
    names = {"config.json", "model.safetensors", "metrics.jsonl", "tokenizer.json"}
    assert set(snapshot(sharded)) == names
    assert open_checkpoint(sharded).config == CONFIG
    np.testing.assert_array_equal(loaded(sharded)[HEAD], new[HEAD])
    np.testing.assert_array_equal(mapped[HEAD], PARAMS[HEAD])  # what was loaded before stays as it was


def test_a_failed_save_leaves_the_old_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(folder)
    broken = PARAMS | {HEAD: np.full_like(PARAMS[HEAD], np.nan)}
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head.weight' holds NaN"):
        save_checkpoint(folder, CONFIG, broken, overwrite=True)
    large = PARAMS | {HEAD: np.full_like(PARAMS[HEAD], 1e5)}
    with pytest.raises(CheckpointError, match="numbers beyond float16"):
        save_checkpoint(folder, CONFIG, large, dtype="float16", overwrite=True)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        save_checkpoint(folder, CONFIG, PARAMS, overwrite=True)
    assert snapshot(folder) == before


def test_an_interrupted_move_is_no_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []

    def replace_one(source: Path, target: Path) -> None:
        moves.append(Path(target).name)
        if len(moves) == 2:
            raise KeyboardInterrupt
        Path(source).rename(target)

    monkeypatch.setattr(checkpoint_module.os, "replace", replace_one)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, CONFIG, init_params(CONFIG, 1), overwrite=True)
    assert moves == ["model.safetensors", "config.json"]
    refused(folder, "has no config.json")
    assert set(snapshot(folder)) == {"model.safetensors"}


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    (tmp_path / "notes.txt").write_text("x")
    files = find_tokenizer_files(tmp_path)
    assert [file.name for file in files] == ["tokenizer.json", "chat_template.jinja"]
    save_checkpoint(tmp_path / "m", CONFIG, PARAMS, tokenizer_files=files)
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "{{ x }}"
    assert set(tensor_shapes(CONFIG)) == set(loaded(tmp_path / "m"))
