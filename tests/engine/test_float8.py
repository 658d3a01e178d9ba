"""K and V, index keys and weights in float8 E4M3 through the whole program: each by its own switch, and all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clsa
from clsa.config import EngineConfig, Quantization, SamplingParams
from clsa.convert import convert
from clsa.errors import BackendError, CheckpointError, ConfigError
from clsa.llm import LLM
from clsa.ops import Float8Weight
from clsa.params import num_parameters, state_bytes_per_token, tensor_shapes
from clsa.weights import weight_bytes
from tests.engine import models
from tests.engine.models import CONFIG
from tests.tolerance import relative_rms

KV, INDEX, WEIGHTS = {"kv_dtype": "fp8"}, {"index_dtype": "fp8"}, {"weight_dtype": "fp8"}
ALL = KV | INDEX | WEIGHTS
SWITCHES = pytest.mark.parametrize("switches", [KV, INDEX, WEIGHTS, ALL], ids=["kv", "index", "weights", "all"])
PROMPT = [2 + (7 * i * i + i) % 300 for i in range(300)]  # longer than what the index selects
HOW = SamplingParams(max_tokens=20, ignore_eos=True)


def load(backend: str, switches: dict[str, str], **engine: Any) -> LLM:
    return models.load(backend, **(switches | engine))


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}.{key}")
    else:
        yield path, tree


@SWITCHES
@models.on_backends
def test_every_backend_agrees_with_the_specification(backend: str, switches: dict[str, str]) -> None:
    if backend == "mlx" and "weight_dtype" in switches:
        with pytest.raises(BackendError, match="no fp8 weights; `clsa convert --quantize 8` makes 8-bit ones"):
            load(backend, switches)
        return
    exact, llm = load("numpy", switches), load(backend, switches)
    assert llm.generate(PROMPT, HOW)[0].token_ids == exact.generate(PROMPT, HOW)[0].token_ids
    # A number close to the middle of two of E4M3 may be rounded to the other one.
    assert relative_rms(llm.logits(PROMPT), exact.logits(PROMPT)) < 0.01
    chosen, wanted = llm.selection(PROMPT), exact.selection(PROMPT)
    assert np.mean(chosen == wanted) > 0.98


@SWITCHES
def test_it_changes_something_and_not_much(switches: dict[str, str]) -> None:
    original, llm = models.load("numpy"), load("numpy", switches)
    error = relative_rms(llm.logits(PROMPT), original.logits(PROMPT))
    assert 1e-3 < error < 0.4, error
    assert np.array_equal(llm.selection(PROMPT), original.selection(PROMPT)) == (
        "kv_dtype" in switches and len(switches) == 1
    )


@SWITCHES
@models.on_backends
def test_what_is_kept_is_as_small_as_the_plan_says(backend: str, switches: dict[str, str]) -> None:
    if backend == "mlx":
        switches = {name: value for name, value in switches.items() if name != "weight_dtype"}
    llm = load(backend, switches, max_tokens_in_memory=1024)
    wide = 8 if backend == "numpy" else 4
    state = llm._engine._runner._state
    assert state is not None
    for memory in state.memories:
        assert memory.k_idx is not None
        for array, switch in ((memory.k, "kv_dtype"), (memory.v, "kv_dtype"), (memory.k_idx, "index_dtype")):
            assert array.nbytes == np.prod(array.shape) * (1 if switch in switches else wide)
    for window in state.windows:
        assert window.k.nbytes == np.prod(window.k.shape) * wide, "windows stay as they are"
    kept = {path for path, leaf in leaves(llm._params) if isinstance(leaf, Float8Weight)}
    projections = {path for path, _ in leaves(llm._params) if "_proj" in path}
    assert kept == (projections if "weight_dtype" in switches else set()) and len(projections) > 20
    expected = 1024 * sum(
        numbers * (1 if switch in switches else wide)
        for numbers, switch in ((2 * 2 * 8, "kv_dtype"), (16, "index_dtype"))
    )
    plan = llm._engine.sizes
    rings = (plan.num_slots + plan.num_snapshots) * 2 * 16 * 2 * 2 * 8 * wide
    assert plan.num_bytes == expected + rings


def test_bytes_of_weights() -> None:
    ops = models.load("numpy")._ops
    shapes = tensor_shapes(CONFIG)
    small = [shape for name, shape in shapes.items() if name.endswith("_proj.weight")]
    numbers, rows = sum(a * b for a, b in small), sum(a for a, _ in small)
    assert weight_bytes(ops, CONFIG, "float32") == 8 * num_parameters(CONFIG)
    assert weight_bytes(ops, CONFIG, "float32", "fp8") == 8 * (num_parameters(CONFIG) - numbers) + numbers + 4 * rows
    kv, index = 2 * 2 * 8, 16
    for switches, wanted in ((KV, kv + 4 * index), (INDEX, 4 * kv + index), (ALL, kv + index)):
        stored = EngineConfig(**switches).memory_dtypes  # type: ignore[arg-type]
        assert state_bytes_per_token(CONFIG, "float32", stored) == wanted


# -- cache files -----------------------------------------------------------------------------------------------------


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length])), data[8 + length :]


@pytest.mark.parametrize("backend", [pytest.param("mlx", marks=pytest.mark.mlx), "cuda"])
def test_a_cache_file_keeps_the_dtypes(backend: str, tmp_path: Path) -> None:
    first, second = load(backend, KV | INDEX), load(backend, KV | INDEX)
    assert first.save_cache(tmp_path / "cache", PROMPT) == 256
    found = {name: entry["dtype"] for name, entry in parts_of(tmp_path / "cache")[0].items() if name[0] != "_"}
    memory = {f"memory.0.{name}": "F8_E4M3" for name in ("k", "v", "k_idx")}
    windows = {f"window.{i}.{name}": "F32" for i in range(2) for name in ("k", "v")}
    assert found == memory | windows | {"tokens": "U32"}
    assert second.load_cache(tmp_path / "cache") == 256
    got, want = second.generate(PROMPT, HOW)[0], first.generate(PROMPT, HOW)[0]
    assert got.cached_tokens == 256 and got.token_ids == want.token_ids
    second.save_cache(tmp_path / "again", PROMPT)
    assert parts_of(tmp_path / "again") == parts_of(tmp_path / "cache"), "bit for bit"


def test_a_cache_file_of_other_switches_is_refused(tmp_path: Path) -> None:
    path, keys = tmp_path / "cache", set()
    for ours in ({}, KV, INDEX, WEIGHTS, ALL):
        llm = load("cuda", ours)
        llm.save_cache(path, PROMPT)
        keys.add(llm.cache_key(PROMPT))
        for name in ("kv_dtype", "index_dtype", "weight_dtype"):
            theirs = (
                {key: value for key, value in ours.items() if key != name} if name in ours else ours | {name: "fp8"}
            )
            with pytest.raises(CheckpointError, match=f"was written with {name} .*; load the model with that {name}"):
                load("cuda", theirs).load_cache(path)
    assert len(keys) == 5


def test_a_damaged_number_in_8_bits_is_found(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    load("cuda", KV).save_cache(path, PROMPT)
    data = bytearray(path.read_bytes())
    at = 8 + int.from_bytes(data[:8], "little") + parts_of(path)[0]["memory.0.v"]["data_offsets"][0]
    data[at + 5] = 0xFF
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"memory\.0\.v holds NaN or infinity"):
        load("cuda", KV).load_cache(path)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kv_dtype", "index_dtype", "weight_dtype"])
@pytest.mark.parametrize("value", ["int8", "float32", "FP8", 8, True])
def test_there_are_two_choices(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be None or 'fp8', got"):
        EngineConfig(**{name: value})


def test_weights_that_are_quantised_already(tmp_path: Path) -> None:
    convert(models.folder(), tmp_path / "small", quantization=Quantization(group_size=32, bits=4))
    with pytest.raises(ConfigError, match="the weights of this model have 4 bits already"):
        models.load("numpy", tmp_path / "small", weight_dtype="fp8")
    models.load("numpy", tmp_path / "small", kv_dtype="fp8")


@pytest.mark.parametrize("switches", [KV, INDEX, WEIGHTS], ids=["kv", "index", "weights"])
def test_a_gpu_that_is_too_old(switches: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded: the sentence is the backend's."""
    torch = pytest.importorskip("torch")
    from clsa_cuda.ops import _no_fp8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    reasons = _no_fp8(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not _no_fp8(torch.device("cuda:0")) and not _no_fp8(torch.device("cpu"))
    monkeypatch.setattr("clsa.spec.no_fp8", reasons)
    with pytest.raises(BackendError, match=r"fp8 needs compute capability 8.9 \(Ada\) or later, and cuda:0 has 8.6"):
        load("numpy", switches)


def test_a_checkpoint_is_not_kept_in_8_bits(tmp_path: Path) -> None:
    """F8_E4M3 is a form of state, and none of weights on disk."""
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    folder = models.save(tmp_path / "model", replace(CONFIG))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has dtype 'F8_E4M3', must be one of BF16, F16, F32, U32"):
        clsa.load(str(folder), backend="numpy")
