"""Whatever is wrong with a checkpoint is refused in one sentence, before a weight is touched."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from clsa import tensor_file
from clsa.checkpoint import open_checkpoint, save_checkpoint
from clsa.errors import CheckpointError, ConfigError
from tests.core.checkpoints import (
    CONFIG,
    HEAD,
    INDEX,
    PARAMS,
    edit_header,
    edit_json,
    folder,
    loaded,
    refused,
    sharded,
    write_raw,
)

__all__ = ["folder", "sharded"]  # fixtures


# -- the config -------------------------------------------------------------------------------------------------


def test_missing_folders_and_configs(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nothing", "is no folder")
    refused(folder / "model.safetensors", "is no folder")
    refused(tmp_path, "has no config.json")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not valid JSON"),
        (b'{"vocab_size": 32', "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"head_dim": 6, "head_dim": 8}', "the key 'head_dim' occurs twice"),
        (b'{"quantization": {"bits": 4, "bits": 8}}', "the key 'bits' occurs twice"),
        (b'{"rms_norm_eps": NaN}', "NaN is not a JSON value"),
        (b'{"rope_theta": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON"),
        (b'{"a": "' + b"x" * (1 << 24) + b'"}', "has 16777225 bytes; at most"),
    ],
    ids=["empty", "cut", "not-utf8", "list", "twice", "nested-twice", "nan", "inf", "digits", "deep", "large"],
)
def test_malformed_configs(folder: Path, text: bytes, match: str) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder, f"config.json.* {match}|config.json {match}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "unknown config key 'rope_scaling'"),
        ({"vocab_size": 10**30}, "vocab_size must be between"),
        ({"hidden_size": -8}, "hidden_size must be between"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be between"),
        ({"head_dim": True}, "head_dim must be an integer"),
        ({"model_type": "llama"}, "model_type must be 'clsa'"),
        ({"layer_types": [["sliding_attention"]] * 4}, "layer_types"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unknown_and_absurd_config_values(folder: Path, change: dict[str, Any], match: str) -> None:
    edit_json(folder / "config.json", lambda data: data.update(change))
    refused(folder, f"config.json: {match}", ConfigError)


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_code_hooks(folder: Path, key: str) -> None:
    edit_json(folder / "config.json", lambda data: data.update({key: {"AutoModel": "modeling.Model"}}))
    refused(folder, f"asks to run code \\({key}\\), which clsa never does")


def test_sizes_the_weights_do_not_have_cost_nothing(folder: Path) -> None:
    largest = {"vocab_size": 1 << 22, "hidden_size": 1 << 17, "intermediate_size": 1 << 19}
    edit_json(folder / "config.json", lambda data: data.update(largest))
    tracemalloc.start()
    refused(folder, "has shape .* where the config needs")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# -- the weights ------------------------------------------------------------------------------------------------


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "weights are missing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, f"only pickle weights \\({name}\\); convert them to safetensors")


def test_a_pickle_by_another_name(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(1000))
    refused(folder, "truncated or no safetensors file")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, -1000])
def test_truncated_files(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "truncated")


def test_too_long_files(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused(folder, "is too long")


def test_absurd_header_lengths(folder: Path) -> None:
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write((200 << 20).to_bytes(8, "little"))
        file.truncate(1 << 30)  # sparse
    started = time.perf_counter()
    refused(folder, "has a header of 209715200 bytes")
    assert time.perf_counter() - started < 1
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:100])
    refused(folder, "truncated or no safetensors file")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: h[HEAD].update(dtype="F64"), "dtype 'F64', must be one of BF16, F16, F32"),
        (lambda h: h[HEAD].update(dtype=["F32"]), "must be one of BF16"),
        (lambda h: h[HEAD].update(dtype="F16"), "bytes of data where its shape"),
        (lambda h: h[HEAD].update(shape=[32, 9]), "bytes of data where its shape"),
        (lambda h: h[HEAD].update(shape=[8, 32]), r"'lm_head.weight' has shape \[8, 32\] .* needs \[32, 8\]"),
        (lambda h: h[HEAD].update(shape=[256]), r"has shape \[256\]"),
        (lambda h: h[HEAD].update(shape=[-32, -8]), "must be a list of sizes"),
        (lambda h: h[HEAD].update(shape=[32.0, 8]), "must be a list of sizes"),
        (lambda h: h[HEAD].update(shape=[True] * 9), "must be a list of sizes"),
        (lambda h: h[HEAD].update(shape=32), "must be a list of sizes"),
        (lambda h: h[HEAD].update(shape=[10**30, 8]), "must be a list of sizes"),
        (lambda h: h[HEAD].update(data_offsets=[0, 10**30]), "two byte positions"),
        (lambda h: h[HEAD].update(data_offsets=[1024, 0]), "bytes of data where"),
        (lambda h: h[HEAD].update(data_offsets=[0]), "two byte positions"),
        (lambda h: h[HEAD].update(data_offsets="00"), "two byte positions"),
        (lambda h: h[HEAD].update(code="x"), "must have dtype, shape and data_offsets"),
        (lambda h: h.update({HEAD: None}), "must have dtype, shape and data_offsets"),
        (lambda h: h.update({HEAD: h["model.embed_tokens.weight"]}), "the file is damaged"),
        (
            lambda h: [
                t["data_offsets"].__setitem__(slice(None), [o + 4 for o in t["data_offsets"]]) for t in h.values()
            ],
            "expected",
        ),
        (lambda h: h.pop(HEAD), "truncated|too long|damaged"),
        (lambda h: h.update({"lm_head.bias": h.pop(HEAD)}), "lacks tensor 'lm_head.weight'"),
        (
            lambda h: h.update(empty={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
            "has tensor 'empty', which the config does not call for",
        ),
        (lambda h: h.clear(), "too long"),
    ],
)
def test_malformed_headers(folder: Path, change: Callable[[dict[str, Any]], Any], match: str) -> None:
    edit_header(folder / "model.safetensors", change)
    refused(folder, match)


def test_headers_that_are_not_json(folder: Path) -> None:
    path = folder / "model.safetensors"
    twice = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'
    for header in (b"{", b"[]", b"\xff\xff", b"{}{}", twice):
        write_raw(path, header, b"")
        refused(folder, "the header of .* (is not valid JSON|must be a JSON object)")


def test_missing_and_extra_tensors_are_named_but_not_all_of_hundreds(tmp_path: Path, folder: Path) -> None:
    tied = tmp_path / "tied"
    save_checkpoint(tied, replace(CONFIG, tie_word_embeddings=True), {k: v for k, v in PARAMS.items() if k != HEAD})
    edit_json(tied / "config.json", lambda data: data.update(tie_word_embeddings=False))
    refused(tied, "lacks tensor 'lm_head.weight', which the config calls for")
    edit_json(folder / "config.json", lambda data: data.update(tie_word_embeddings=True))
    refused(folder, "has tensor 'lm_head.weight', which the config does not call for")
    edit_json(folder / "config.json", lambda data: data.update(tie_word_embeddings=False, index_topk_pattern="DD"))
    refused(folder, "has tensors 'model.layers.2.indexer.q_proj.weight', 'model.memory.index_k_proj.weight', which")
    layers = {"num_hidden_layers": 400, "layer_types": ["sliding_attention"] * 398 + ["cross_attention"] * 2}
    edit_json(folder / "config.json", lambda data: data.update(layers, index_topk_pattern="FS"))
    refused(folder, "lacks tensors .* and [0-9]+ more")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(tmp_path: Path, dtype: str, value: float) -> None:
    save_checkpoint(tmp_path, CONFIG, PARAMS, dtype=dtype)
    entry = next(e for e in open_checkpoint(tmp_path).entries if e.name == "model.layers.1.mlp.up_proj.weight")
    number = np.array([value]).astype(tensor_file.NUMPY_DTYPES[entry.dtype])
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(entry.offset + entry.nbytes - number.nbytes)
        file.write(number.tobytes())
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.1.mlp.up_proj.weight' holds NaN or infinity"):
        loaded(tmp_path)


@pytest.mark.parametrize("dtype", list(tensor_file.FLOAT_DTYPES.values()), ids=str)
def test_finite_is_judged_over_all_chunks(monkeypatch: pytest.MonkeyPatch, dtype: np.dtype[Any]) -> None:
    monkeypatch.setattr(tensor_file, "_CHUNK", 7)
    extremes = np.array([0, -0.0, ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min], dtype)
    array = np.tile(extremes, 8)
    assert tensor_file.is_finite(array)
    for i in (0, 6, 7, 31):
        for bad in (np.nan, np.inf, -np.inf):
            broken = array.copy()
            broken[i] = bad
            assert not tensor_file.is_finite(broken)


def test_a_file_that_shrinks_after_it_was_checked(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 3000)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        dict(checkpoint.tensors())


# -- links and shards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to("../elsewhere")
    refused(folder, f"{name} is a link out of its folder")
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    refused(folder, name)
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, f"{name} is not a regular file")
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    refused(folder, f"{name} is not a regular file")


def test_links_within_the_folder_and_to_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert set(loaded(tmp_path / "link")) == set(PARAMS)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:x.safetensors", "..",
     ".x.safetensors", "", "x", "x.safetensors\n", "x\0.safetensors", "x.py", 3, None, ["x.safetensors"]],
    ids=repr,
)  # fmt: skip
def test_index_files_that_point_elsewhere(sharded: Path, shard: Any) -> None:
    edit_json(sharded / INDEX, lambda data: data["weight_map"].update({HEAD: shard}))
    refused(sharded, "only safetensors files beside the index are read")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.pop("weight_map"), "must have a weight_map"),
        (lambda d: d.update(weight_map=[]), "must have a weight_map"),
        (lambda d: d.update(weight_map={}), "must have a weight_map"),
        (lambda d: d["weight_map"].update({HEAD: "pytorch_model-00001.bin"}), "names pickle weights"),
        (lambda d: d["weight_map"].pop(HEAD), "lacks tensor 'lm_head.weight'"),
        (lambda d: d["weight_map"].update({"extra": "model-00001-of-00004.safetensors"}), "has tensor 'extra'"),
        (lambda d: d["weight_map"].update({HEAD: "gone.safetensors"}), "gone.safetensors is missing|other tensors"),
        (lambda d: d["weight_map"].update({HEAD: d["weight_map"]["model.embed_tokens.weight"]}), "other tensors"),
    ],
)
def test_malformed_index_files(sharded: Path, change: Callable[[dict[str, Any]], Any], match: str) -> None:
    edit_json(sharded / INDEX, change)
    refused(sharded, match)


def test_shards_out_of_the_folder_missing_and_doubled(sharded: Path, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    refused(sharded, f"{shard.name} is missing")
    shard.symlink_to(tmp_path / "elsewhere")
    refused(sharded, f"{shard.name} is a link out of its folder")
    (sharded / "model.safetensors").write_bytes(b"")
    refused(sharded, "has both model.safetensors and model.safetensors.index.json")
