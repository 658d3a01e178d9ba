"""Quantised checkpoints: what they hold, how they are made and read, and every way in which they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsa import checkpoint as checkpoint_module
from clsa import spec
from clsa.checkpoint import open_checkpoint, save_checkpoint
from clsa.config import EngineConfig, Quantization
from clsa.convert import convert
from clsa.errors import CheckpointError, ConfigError, TrainError
from clsa.ops import QuantizedWeight, StepSize
from clsa.params import StoredTensor, flatten, num_parameters, stored_tensors, tensor_shapes
from clsa.plan import make_plan
from clsa.quantization import dequantize, quantize
from clsa.sizing import plan_sizes
from clsa.train.config import TrainConfig
from clsa.train.stages import begin
from clsa.weights import dense_weights, host_weights, load_weights, weight_bytes
from tests.core.checkpoints import edit_header, edit_json, loaded, refused
from tests.core.quantized import CONFIG, FORMS, PARAMS, original, quantized

Q4 = Quantization(group_size=64, bits=4)
Q_PROJ, DOWN, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.norm.weight"
on_forms = pytest.mark.parametrize("how", FORMS, ids=lambda how: f"{how.bits}-bit-{how.group_size}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return quantized(tmp_path / "model", Q4)


class Keeper:
    """Ops that keep quantised weights, with every array on the host."""

    keeps_quantized = True
    device = "a device"
    step_size = StepSize(32, 2048)
    temporary_bytes = 0
    free = 0

    def asarray(self, x: np.ndarray, dtype: str) -> np.ndarray:
        return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def quantized_weight(self, host: QuantizedWeight, dtype: str) -> QuantizedWeight:
        return replace(host, scales=self.asarray(host.scales, dtype), biases=self.asarray(host.biases, dtype))

    def evaluate(self, *values: Any) -> None:
        """Nothing to do: the host has computed them."""

    def itemsize(self, dtype: str) -> int:
        return {"float32": 4, "bfloat16": 2}[dtype]

    def memory_stats(self) -> dict[str, int]:
        return {"total": self.free, "free": self.free, "peak": 0}


# -- the numbers ------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(FORMS), st.floats(-4, 4), st.floats(1e-6, 1e3))
def test_no_number_moves_by_more_than_a_step(seed: int, how: Quantization, shift: float, size: float) -> None:
    weight = ((np.random.default_rng(seed).standard_normal((3, 128)) + shift) * size).astype(np.float32)
    weight[1, ::3] = 0
    q = quantize(weight, how)
    step = np.repeat(np.abs(q.scales), how.group_size, axis=1)
    assert np.all(np.abs(dequantize(q) - weight) <= step * 1.001)
    groups = weight.reshape(3, -1, how.group_size)
    reach = groups.max(axis=-1) - groups.min(axis=-1)
    assert np.all(np.abs(q.scales) <= np.maximum(2 * reach, np.abs(groups).max(axis=-1)) / (2**how.bits - 1) + 1e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_and_the_far_extreme_are_met(bits: int) -> None:
    """The scale divides the extreme, and so 0 is a whole number of steps away from it."""
    weight = np.zeros((1, 64), np.float32)
    weight[0, :3] = 15.0, -3.75, 7.5
    out = dequantize(quantize(weight, Quantization(group_size=64, bits=bits)))
    assert out[0, 0] == 15.0 and np.all(np.abs(out[0, 3:]) < 2e-6)


def test_many_rows_are_quantised_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((37, 64)).astype(np.float32)
    whole = quantize(weight, Q4)
    monkeypatch.setattr("clsa.quantization._ROWS", 5)
    parts = quantize(weight, Q4)
    for name in ("packed", "scales", "biases"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


# -- what a checkpoint holds ------------------------------------------------------------------------------------


def test_what_is_stored() -> None:
    wanted = stored_tensors(replace(CONFIG, quantization=Q4))
    assert wanted["model.embed_tokens.weight"] == StoredTensor((70, 8), packed=True)
    assert wanted["model.embed_tokens.scales"] == wanted["model.embed_tokens.biases"] == StoredTensor((70, 1))
    assert wanted["model.layers.2.indexer.q_proj.weight"] == StoredTensor((10, 8), packed=True)
    assert wanted["model.memory.index_k_proj.scales"] == StoredTensor((10, 1))
    assert wanted["lm_head.weight"] == StoredTensor((70, 8), packed=True)
    assert wanted[f"{DOWN}.weight"] == StoredTensor((64, 96)) and f"{DOWN}.scales" not in wanted
    assert wanted[NORM] == StoredTensor((64,))
    eight = stored_tensors(replace(CONFIG, quantization=Quantization(group_size=32, bits=8)))
    assert eight[f"{DOWN}.weight"] == StoredTensor((64, 24), packed=True)
    assert eight[f"{DOWN}.biases"] == StoredTensor((64, 3))
    assert {name: tensor.shape for name, tensor in stored_tensors(CONFIG).items()} == tensor_shapes(CONFIG)
    assert not any(tensor.packed for tensor in stored_tensors(CONFIG).values())


@on_forms
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path: Path, how: Quantization, tied: bool) -> None:
    checkpoint = open_checkpoint(quantized(tmp_path / "q", how, tied=tied))
    config = replace(CONFIG, quantization=how, tie_word_embeddings=tied)
    assert checkpoint.config == config
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization"] == {
        "group_size": how.group_size,
        "bits": how.bits,
    }
    arrays, stored = dict(checkpoint.tensors()), stored_tensors(config)
    assert {name: StoredTensor(a.shape, a.dtype == np.uint32) for name, a in arrays.items()} == stored
    assert {a.dtype.name for a in arrays.values()} == {"uint32", "bfloat16"}
    assert checkpoint.num_bytes == sum(array.nbytes for array in arrays.values())
    weights = dict(host_weights(checkpoint))
    assert weights.keys() == tensor_shapes(config).keys()
    for name, weight in weights.items():
        source = PARAMS[name].astype(ml_dtypes.bfloat16)
        if not isinstance(weight, QuantizedWeight):
            assert not stored[name].packed and np.array_equal(weight, source)
            continue
        again = quantize(source, how)
        assert (weight.group_size, weight.bits) == (how.group_size, how.bits)
        for part in ("packed", "scales", "biases"):
            assert np.array_equal(getattr(weight, part), getattr(again, part))


def test_parts_of_a_weight_may_lie_in_different_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(dense_weights(open_checkpoint(quantized(tmp_path / "whole", Q4))))
    monkeypatch.setattr(checkpoint_module, "MAX_SHARD_BYTES", 600)
    sharded = quantized(tmp_path / "sharded", Q4)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    assert any(places[name] != places[f"{name[: -len('scales')]}weight"] for name in places if name.endswith("scales"))
    assert index["metadata"]["total_size"] == open_checkpoint(sharded).num_bytes
    parts = dict(dense_weights(open_checkpoint(sharded)))
    assert parts.keys() == whole.keys() == PARAMS.keys()
    assert all(np.array_equal(parts[name], whole[name]) for name in whole)


def test_a_quantised_projection_is_one_leaf(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    tree = load_weights(Keeper(), checkpoint, "float32")  # type: ignore[arg-type]
    flat = flatten(tree)
    assert flat.keys() == PARAMS.keys()
    leaf = tree["layers"][0]["self_attn"]["q_proj"]
    assert isinstance(leaf, QuantizedWeight) and leaf.scales.dtype == np.float32
    dense = flatten(load_weights(spec, checkpoint, "float32"))
    for name, weight in flat.items():
        whole = dequantize(weight) if isinstance(weight, QuantizedWeight) else weight
        assert dense[name].dtype == np.float64
        np.testing.assert_allclose(whole, dense[name], rtol=1e-5, atol=1e-7)


def test_memory_is_counted_as_the_backend_holds_it(folder: Path) -> None:
    checkpoint, keeper = open_checkpoint(folder), Keeper()
    ops: Any = keeper
    assert weight_bytes(ops, checkpoint.config, "bfloat16") == checkpoint.num_bytes
    assert weight_bytes(ops, CONFIG, "bfloat16") == 2 * num_parameters(CONFIG)
    expanded: Any = spec
    assert weight_bytes(expanded, checkpoint.config, "bfloat16") == 8 * num_parameters(CONFIG)
    plan, engine = make_plan(checkpoint.config), EngineConfig(max_num_seqs=1, memory_fraction=0.9)
    keeper.free = checkpoint.num_bytes - 1
    with pytest.raises(ConfigError, match=f"the weights need {checkpoint.num_bytes:,} bytes in bfloat16"):
        plan_sizes(ops, plan, "bfloat16", engine)
    keeper.free = checkpoint.num_bytes + (64 << 20)
    assert plan_sizes(ops, plan, "bfloat16", engine).num_pages > 0


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"group_size": 64, "bits": 3}, "quantization.bits must be between 4 and 8, got 3"),
        ({"group_size": 64, "bits": 6}, "quantization.bits must be 4 or 8, got 6"),
        ({"group_size": 17, "bits": 4}, "quantization.group_size must be between 32 and 128, got 17"),
        ({"group_size": 96, "bits": 4}, "quantization.group_size must be 32, 64 or 128, got 96"),
        ({"group_size": 64, "bits": 4, "lm_head": {"bits": 8}}, "quantization must be an object with group_size"),
    ],
)
def test_forms_that_do_not_exist(folder: Path, how: dict[str, Any], match: str) -> None:
    edit_json(folder / "config.json", lambda data: data.update(quantization=how))
    refused(folder, match, ConfigError)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (None, r"has tensors 'lm_head.biases', .* and \d+ more, which the config does not call for"),
        ({"group_size": 64, "bits": 8}, r"tensor 'model.embed_tokens.weight' has shape \[70, 8\] .* needs \[70, 16\]"),
        ({"group_size": 32, "bits": 4}, r"lacks tensors 'model.layers.0.mlp.down_proj.scales', "),
    ],
)
def test_the_config_says_otherwise(folder: Path, how: object, match: str) -> None:
    edit_json(folder / "config.json", lambda data: data.update(quantization=how))
    refused(folder, match)


def test_a_config_that_calls_ordinary_weights_quantised(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", CONFIG, PARAMS)
    edit_json(tmp_path / "m" / "config.json", lambda data: data.update(quantization={"group_size": 64, "bits": 4}))
    refused(tmp_path / "m", r"lacks tensors 'model.embed_tokens.scales', 'model.embed_tokens.biases', .* more")


Header = dict[str, Any]


def _as(name: str, dtype: str) -> Callable[[Header], Any]:
    return lambda header: header[name].update(dtype=dtype)


def _shape(name: str, *shape: int) -> Callable[[Header], Any]:
    return lambda header: header[name].update(shape=list(shape))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_as(f"{Q_PROJ}.weight", "F32"), "holds floating-point numbers where the config needs packed integers"),
        (lambda h: _pair_as_u32(h, f"{Q_PROJ}.scales"), "holds packed integers .* needs floating-point numbers"),
        (lambda h: _pair_as_u32(h, NORM), "'model.norm.weight' holds packed integers .* needs floating-point"),
        (_as(f"{Q_PROJ}.weight", "I32"), "has dtype 'I32', must be one of BF16, F16, F32, U32"),
        (_as(f"{Q_PROJ}.weight", "U8"), "has dtype 'U8', must be one of"),
        (_shape(f"{Q_PROJ}.weight", 8, 64), r"has shape \[8, 64\] where the config needs \[64, 8\]"),
        (_shape(f"{Q_PROJ}.biases", 1, 64), r"biases' has shape \[1, 64\] where the config needs \[64, 1\]"),
        (lambda h: h.update({f"{Q_PROJ}.scale": h.pop(f"{Q_PROJ}.scales")}), f"lacks tensor '{Q_PROJ}.scales'"),
        (lambda h: h.update({f"{DOWN}.scales": h.pop(f"{Q_PROJ}.biases")}), f"lacks tensor '{Q_PROJ}.biases'"),
    ],
)
def test_damaged_tensors(folder: Path, change: Callable[[Header], Any], match: str) -> None:
    edit_header(folder / "model.safetensors", change)
    refused(folder, match)


def _pair_as_u32(header: Header, name: str) -> None:
    """The same bytes as half as many words."""
    header[name].update(dtype="U32", shape=[*header[name]["shape"][:-2], header[name]["shape"][0] // 2])


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_scales_that_are_not_finite(folder: Path, part: str) -> None:
    entry = next(e for e in open_checkpoint(folder).entries if e.name == f"{Q_PROJ}.{part}")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(entry.offset)
        file.write(np.array([np.nan], ml_dtypes.bfloat16).tobytes())
    with pytest.raises(CheckpointError, match=f"tensor '{Q_PROJ}.{part}' holds NaN or infinity"):
        list(host_weights(open_checkpoint(folder)))


def test_any_packed_word_is_a_weight(folder: Path) -> None:
    """As float32 these words would be NaN."""
    entry = next(e for e in open_checkpoint(folder).entries if e.name == f"{Q_PROJ}.weight")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"\xff" * entry.nbytes)
    assert np.all(loaded(folder)[f"{Q_PROJ}.weight"] == 0xFFFFFFFF)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    tensors, config = loaded(quantized(tmp_path / "q", Q4)), replace(CONFIG, quantization=Q4)
    for name, array in (
        (f"{Q_PROJ}.weight", tensors[f"{Q_PROJ}.weight"].astype(np.float32)),
        (f"{Q_PROJ}.weight", tensors[f"{Q_PROJ}.weight"].astype(np.int64)),
        (NORM, np.zeros(64, np.uint32)),
        (f"{Q_PROJ}.scales", tensors[f"{Q_PROJ}.scales"].T),
    ):
        with pytest.raises(CheckpointError, match=r"^the model to save: tensor .* the config needs"):
            save_checkpoint(tmp_path / "out", config, tensors | {name: array})
    assert not (tmp_path / "out").exists()
    save_checkpoint(tmp_path / "out", config, tensors, dtype="float32")
    again = loaded(tmp_path / "out")
    assert all(np.array_equal(again[name], array) for name, array in tensors.items())
    assert {array.dtype.name for array in again.values()} == {"uint32", "float32"}


# -- converting -------------------------------------------------------------------------------------------------


def test_back_to_floating_point(tmp_path: Path, folder: Path) -> None:
    made = convert(folder, tmp_path / "dense", dtype="float32")
    assert made.config == replace(CONFIG, torch_dtype="float32")
    wanted = dict(dense_weights(open_checkpoint(folder)))
    for name, array in made.tensors():
        assert array.dtype == np.float32 and np.array_equal(array, wanted[name].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_alone(tmp_path: Path, dtype: str) -> None:
    made = convert(original(), tmp_path / "m", dtype=dtype)
    assert made.config == replace(CONFIG, torch_dtype=dtype)
    for name, array in made.tensors():
        assert array.dtype.name == dtype
        assert np.array_equal(array, PARAMS[name].astype(ml_dtypes.bfloat16).astype(array.dtype))


def test_weights_are_rounded_before_they_are_quantised(tmp_path: Path) -> None:
    """As mlx-lm does, so that the same numbers come out."""
    save_checkpoint(tmp_path / "wide", replace(CONFIG, torch_dtype="float32"), PARAMS)
    made = convert(tmp_path / "wide", tmp_path / "q", quantization=Q4, dtype="float16")
    again = quantize(PARAMS[f"{Q_PROJ}.weight"].astype(np.float16), Q4)
    arrays = dict(made.tensors())
    assert np.array_equal(arrays[f"{Q_PROJ}.scales"], again.scales)
    assert np.array_equal(arrays[f"{Q_PROJ}.weight"], again.packed)


def test_conversions_that_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is quantised already \(4 bits\); convert the checkpoint it was made"):
        convert(folder, tmp_path / "out", quantization=Quantization(bits=8))
    with pytest.raises(CheckpointError, match="no matrix whose rows are a multiple of 128"):
        convert(original(), tmp_path / "out", quantization=Quantization(group_size=128))
    with pytest.raises(CheckpointError, match=r"is no folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_read_when_the_target_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.tensor_file.mmap.mmap", None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target in (folder, original()):
        with pytest.raises(CheckpointError, match=r"already holds .*; choose another folder"):
            convert(original(), target, quantization=Q4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_numbers_beyond_the_dtype(tmp_path: Path) -> None:
    for name in (f"{Q_PROJ}.weight", f"{DOWN}.weight"):
        params = {n: array.copy() for n, array in PARAMS.items()}
        params[name][3, 5] = 1e6
        source = tmp_path / name
        save_checkpoint(source, CONFIG, params)
        for how in (Q4, None):
            with pytest.raises(CheckpointError, match=r"holds NaN, or numbers beyond float16; it was not saved"):
                convert(source, tmp_path / "out", quantization=how, dtype="float16")
            assert not (tmp_path / "out" / "config.json").exists()


def test_quantised_weights_are_not_trained(folder: Path) -> None:
    config = TrainConfig(stage="joint", seq_len=64, batch_size=1, tokens_per_step=64, steps=1, learning_rate=1e-3)
    with pytest.raises(TrainError, match="quantised weights cannot be trained"):
        begin(config, folder)
