"""The state of a prompt in a file: found again by another process, and refused by whoever it does not belong to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clsa
from clsa.config import PAGE_SIZE, SamplingParams
from clsa.errors import CheckpointError, ClsaError, RequestError
from clsa.llm import LLM
from tests.engine import models
from tests.engine.models import CONFIG, CROSS, FULL, SLIDING, assert_all_returned

PROMPT = [(7 * i * i + i) % CONFIG.vocab_size for i in range(300)]
HOW = SamplingParams(max_tokens=8, logprobs=2, ignore_eos=True)
both = pytest.mark.parametrize(
    "backend", [pytest.param("mlx", marks=pytest.mark.mlx), pytest.param("cuda", id="cuda-cpu")]
)
PLANS = [
    ((SLIDING, SLIDING, CROSS, CROSS), "FS"),
    ((FULL, FULL, SLIDING, CROSS), "DFS"),
    ((FULL, FULL, FULL, FULL), "FSDF"),
]


def load(model: Path | None = None, **engine: Any) -> LLM:
    return models.load("mlx", model, **engine)


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@both
@pytest.mark.parametrize(("layer_types", "pattern"), PLANS)
def test_another_process_goes_on_from_the_file(
    backend: str, layer_types: tuple[str, ...], pattern: str, tmp_path: Path
) -> None:
    folder = models.folder(layer_types=layer_types, index_topk_pattern=pattern)
    first, second = models.load(backend, folder), models.load(backend, folder)
    assert first.save_cache(tmp_path / "cache", PROMPT) == 256
    assert second.load_cache(tmp_path / "cache") == 256
    found = second.generate([PROMPT, [*PROMPT[:256], 1, 2, 3]], HOW)
    assert [output.cached_tokens for output in found] == [256, 256]
    wanted = first.generate([PROMPT, [*PROMPT[:256], 1, 2, 3]], HOW)  # from the cache, as in the other process
    for got, want in zip(found, wanted):
        assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
    assert_all_returned(second.stats())


@pytest.mark.mlx
def test_the_file_is_the_same_wherever_its_pages_lay(tmp_path: Path) -> None:
    one, other = load(), load()
    other.generate([[5] * 200, [6] * 100], HOW)
    for llm, name in ((one, "one"), (other, "other")):
        llm.save_cache(tmp_path / name, PROMPT)
    assert read(tmp_path / "one") == read(tmp_path / "other")


@pytest.mark.mlx
def test_a_prompt_of_whole_pages_and_a_short_one(tmp_path: Path) -> None:
    llm, other = load(), load()
    assert llm.save_cache(str(tmp_path / "cache"), PROMPT[: 2 * PAGE_SIZE]) == 2 * PAGE_SIZE
    assert other.load_cache(str(tmp_path / "cache")) == 2 * PAGE_SIZE
    assert other.generate(PROMPT, HOW)[0].cached_tokens == 2 * PAGE_SIZE
    with pytest.raises(RequestError, match="holds 0 tokens of this prompt of 63"):
        llm.save_cache(tmp_path / "no", PROMPT[: PAGE_SIZE - 1])
    with pytest.raises(RequestError, match="holds 0 tokens of this prompt of 300"):
        load(prefix_cache_bytes=0).save_cache(tmp_path / "no", PROMPT)
    assert not (tmp_path / "no").exists()


@pytest.mark.mlx
def test_a_file_belongs_to_its_backend(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    load().save_cache(path, PROMPT)
    with pytest.raises(CheckpointError, match="holds state of backend 'mlx', this is 'cuda'"):
        models.load("cuda").load_cache(path)
    for act in (models.load().load_cache, lambda path: models.load().save_cache(path, PROMPT)):
        with pytest.raises(RequestError, match="'numpy' keeps no float32 state"):
            act(path)


@pytest.mark.mlx
def test_salt(tmp_path: Path) -> None:
    llm, other, path = load(), load(), tmp_path / "cache"
    llm.save_cache(path, PROMPT, salt="tenant")
    assert b"tenant" not in path.read_bytes()
    for salt in ("", "another"):
        with pytest.raises(CheckpointError, match="was written with another salt"):
            other.load_cache(path, salt=salt)
    assert other.load_cache(path, salt="tenant") == 256
    assert [other.generate(PROMPT, HOW, salt=salt)[0].cached_tokens for salt in ("", "tenant")] == [0, 256]


@pytest.mark.mlx
def test_another_model_is_refused(tmp_path: Path) -> None:
    llm, path = load(), tmp_path / "cache"
    llm.save_cache(path, PROMPT)
    weights = models.params(CONFIG)
    last = weights["model.layers.3.mlp.down_proj.weight"]
    last[-1, -1] = np.nextafter(last[-1, -1], np.float32(9))  # the smallest change there is, in the last layer
    config = replace(CONFIG, rope_theta=2e4)
    for name, folder in {
        "weights": models.save(tmp_path / "weights", weights=weights),
        "config": models.save(tmp_path / "config", config, models.params(CONFIG)),
    }.items():
        with pytest.raises(CheckpointError, match="was written by another model"):
            load(model=folder).load_cache(path)
        assert name
    copy = models.save(tmp_path / "copy")
    assert load(model=copy).load_cache(path) == 256, "the same model in another folder"


@pytest.mark.mlx
def test_another_dtype_is_refused_and_short_ones_are_exact(tmp_path: Path) -> None:
    def load_as(dtype: str) -> LLM:
        return clsa.load(str(models.folder()), backend="mlx", dtype=dtype)

    llm, path = load_as("bfloat16"), tmp_path / "cache"
    wanted = llm.generate(PROMPT, HOW)[0]
    llm.save_cache(path, PROMPT)
    for dtype in ("float32", "float16"):
        with pytest.raises(CheckpointError, match=f"holds state in 'bfloat16', this model runs in '{dtype}'"):
            load_as(dtype).load_cache(path)
    again = load_as("bfloat16")
    again.load_cache(path)
    path.unlink()
    again.save_cache(path, PROMPT)
    assert load_as("bfloat16").load_cache(path) == 256
    assert again.generate(PROMPT, HOW)[0].token_ids == wanted.token_ids


@pytest.mark.mlx
def test_weights_that_changed_on_disk_are_noticed(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model")
    llm = load(model=folder)
    other = models.save(tmp_path / "other", weights=models.params(CONFIG, seed=1))
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="changed after it was loaded"):
        llm.save_cache(tmp_path / "cache", PROMPT)


def one_token_less(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    end = header["tokens"]["data_offsets"][1]
    shorter = {}
    for name, entry in header.items():
        if name != "__metadata__":
            entry = entry | {"data_offsets": [at - 4 * (at >= end) for at in entry["data_offsets"]]}
        shorter[name] = entry | ({"shape": [255]} if name == "tokens" else {})
    return shorter, data[: end - 4] + data[end:]


def bad_files(path: Path) -> dict[str, Any]:
    """What to do to a good file, by the words of the refusal."""
    header, data = read(path)
    tokens = header["tokens"]["data_offsets"]
    k = header["memory.0.k"]["data_offsets"][0]

    def changed(**entries: Any) -> dict[str, Any]:
        return {key: value for key, value in (header | entries).items() if value is not None}

    def meta(**values: str) -> dict[str, Any]:
        return changed(__metadata__=header["__metadata__"] | values)

    def with_bytes(at: int, value: bytes) -> bytes:
        return data[:at] + value + data[at + len(value) :]

    wide = header["window.0.k"] | {"shape": [16, 4, 4]}
    return {
        "is truncated": (header, data[:-1]),
        "is too long": (header, data + b"x"),
        "holds no prefix": (meta(format="clsa-prefix-2"), data),
        r"holds no prefix \(its format is None": (changed(__metadata__=None), data),
        "must be an object of texts": (changed(__metadata__={"format": 1}), data),
        "another model": (meta(model="0" * 64), data),
        "holds state of backend 'cuda'": (meta(backend="cuda"), data),
        "holds state in 'float16'": (meta(dtype="float16"), data),
        "another salt": (meta(salt=""), data),
        "must hold whole pages of 64 tokens": one_token_less(header, data),
        "tensor 'window.0.k' is": (changed(**{"window.0.k": wide}), data),
        "holds the token 4294967295": (header, with_bytes(tokens[0] + 40, b"\xff" * 4)),
        "memory.0.k holds NaN": (header, with_bytes(k + 8, np.float32("nan").tobytes())),
    }


@pytest.mark.mlx
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    load().save_cache(good, PROMPT)
    llm = load()
    before = llm.stats()
    cases = bad_files(good)
    assert len(cases) == 13
    for words, (header, data) in cases.items():
        write(bad, header, data)
        with pytest.raises(CheckpointError, match=words) as caught:
            llm.load_cache(bad)
        assert "\n" not in str(caught.value)
    for content in (b"", b"\0" * 7, b"\0" * 8, b"text" * 100, good.read_bytes()[:500]):
        bad.write_bytes(content)
        with pytest.raises(CheckpointError):
            llm.load_cache(bad)
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="is no file"):
            llm.load_cache(missing)
    assert llm.stats() == before
    assert llm.generate(PROMPT, HOW)[0].cached_tokens == 0


@pytest.mark.mlx
def test_a_cache_without_room_says_the_sizes(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    load().save_cache(path, PROMPT)
    few: list[dict[str, Any]] = [{"max_tokens_in_memory": 192, "max_model_len": 512}, {"prefix_cache_bytes": 0}]
    for sizes in few:
        llm = load(**sizes)
        with pytest.raises(RequestError, match=r"the prefix has 256 tokens and the prefix cache has room for \d+;"):
            llm.load_cache(path)
        assert_all_returned(llm.stats())
    with pytest.raises(CheckpointError, match="at most 128 of them, got 256"):
        load(max_model_len=128).load_cache(path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        load().save_cache(tmp_path / "no folder" / "cache", PROMPT)


@pytest.mark.mlx
def test_loading_makes_room_and_keeps_what_runs(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    load().save_cache(path, PROMPT)
    llm = load(max_tokens_in_memory=512, max_num_seqs=2)
    llm.generate([[3] * 200, [4] * 200], HOW)  # fills the memory with what is idle
    pieces = llm.stream([9] * 70, SamplingParams(max_tokens=40, ignore_eos=True))
    texts = [next(pieces).token]
    assert llm.load_cache(path) == 256
    assert llm.load_cache(path) == 256, "twice is once"
    texts += [piece.token for piece in pieces]
    assert texts == load().generate([9] * 70, SamplingParams(max_tokens=40, ignore_eos=True))[0].token_ids
    assert llm.generate(PROMPT, HOW)[0].cached_tokens == 256
    assert_all_returned(llm.stats())


@pytest.mark.mlx
def test_a_device_that_fails_is_an_error_and_no_more(tmp_path: Path) -> None:
    path, llm = tmp_path / "cache", load()
    load().save_cache(path, PROMPT)
    failing = models.Failing(llm._ops)
    models.exchange_ops(llm, failing)
    for function, act in (
        ("write_window", lambda: llm.load_cache(path)),
        ("take", lambda: llm._engine.read_prefix(PROMPT, "")),
    ):
        failing.mend()
        llm.generate(PROMPT, HOW)
        failing.fail(function, 1, RuntimeError("gone"))
        with pytest.raises(ClsaError, match="the device failed while state was moved"):
            act()
    failing.mend()
    assert llm.load_cache(path) == 256
    assert llm.generate(PROMPT, HOW)[0].cached_tokens == 256
