"""What a run needs to go on where it stopped: safetensors and JSON in one folder, whole or not there at all.

    OUT/resume/step-00000500/   params.safetensors   moments.safetensors   state.json

There is no state of a random generator to keep: the order of the data follows from its seed and position.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clsa.config import ModelConfig, check_float, check_int
from clsa.errors import TrainError
from clsa.files import MAX_JSON_BYTES, parse_json, read_bounded
from clsa.train.config import TrainConfig

FOLDER = "resume"
_NAME = re.compile(r"step-(\d{8,10})")
_KEYS = ("step", "seconds", "data", "frozen", "config", "model")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run after `step` updates."""

    step: int
    seconds: float  # of training so far
    data: Mapping[str, Any]  # state of the batches
    frozen: Mapping[str, str]  # digests of the weights that must not change
    config: TrainConfig
    model: ModelConfig
    params: Mapping[str, np.ndarray]
    moments: Mapping[str, np.ndarray]


def write_snapshot(out: Path, snapshot: Snapshot) -> None:
    """Write it beside the last one under another name, rename it, and only then remove the last one."""
    from safetensors.numpy import save_file

    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=folder))
    save_file(dict(snapshot.params), draft / "params.safetensors")
    save_file(dict(snapshot.moments), draft / "moments.safetensors")
    state = {
        "step": snapshot.step,
        "seconds": snapshot.seconds,
        "data": dict(snapshot.data),
        "frozen": dict(snapshot.frozen),
        "config": snapshot.config.to_dict(),
        "model": snapshot.model.to_dict(),
    }
    (draft / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    target = folder / f"step-{snapshot.step:08d}"
    if target.exists():  # of a finished run that was resumed: the same step again
        shutil.rmtree(target)
    os.replace(draft, target)
    for path in folder.iterdir():
        if path != target and path.name.startswith(("step-", "draft-")):
            shutil.rmtree(path)


def read_snapshot(out: Path) -> Snapshot:
    """The last snapshot of the run in `out`. Raises TrainError if there is none or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = out / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    if not found:
        raise TrainError(f"{out} has no run to resume; leave --resume out to start one")
    path = max(found, key=lambda path: path.name)
    try:
        params, moments = load_file(path / "params.safetensors"), load_file(path / "moments.safetensors")
    except (OSError, SafetensorError) as error:
        raise TrainError(f"{path} is damaged ({error}); start the stage afresh in another folder") from None
    state = parse_json(read_bounded(path / "state.json", MAX_JSON_BYTES), str(path / "state.json"))
    if set(state) != set(_KEYS) or not all(isinstance(state[k], dict) for k in ("data", "frozen", "config", "model")):
        raise TrainError(f"{path / 'state.json'} must have {', '.join(_KEYS)}; start the stage afresh")
    return Snapshot(
        check_int("step", state["step"], 0, 1 << 30, TrainError),
        check_float("seconds", state["seconds"], 0.0, 1e12, TrainError),
        state["data"],
        state["frozen"],
        TrainConfig.from_dict(state["config"]),
        ModelConfig.from_dict(state["model"]),
        params,
        moments,
    )
