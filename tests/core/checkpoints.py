"""A small checkpoint on disk, ways to damage it, and how a refusal looks; for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clsa import checkpoint as checkpoint_module
from clsa import tensor_file
from clsa.checkpoint import open_checkpoint, save_checkpoint
from clsa.config import ModelConfig
from clsa.errors import CheckpointError, ClsaError
from clsa.params import init_params

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    index_head_dim=10,
    layer_types=("sliding_attention", "sliding_attention", "cross_attention", "cross_attention"),
    index_topk_pattern="FS",
    eos_token_id=1,
    torch_dtype="float32",
)
PARAMS = init_params(CONFIG, 0)
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", CONFIG, PARAMS)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checkpoint_module, "MAX_SHARD_BYTES", 4096)
    save_checkpoint(tmp_path / "sharded", CONFIG, PARAMS)
    return tmp_path / "sharded"


def refused(folder: Path, match: str, error: type[ClsaError] = CheckpointError) -> None:
    """Opening says so in one short sentence, and no weight file is mapped or read into an array."""

    def touched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were touched")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file.mmap, "mmap", touched)
        patch.setattr(tensor_file.np, "frombuffer", touched)
        with pytest.raises(error, match=match) as caught:
            open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    write_raw(path, json.dumps(header).encode(), raw[8 + length :])


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def loaded(folder: Path) -> dict[str, np.ndarray]:
    return dict(open_checkpoint(folder).tensors())
