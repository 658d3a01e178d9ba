"""Anyone can ship a backend: a module and an entry point, and nothing of clsa has to know it."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clsa import SamplingParams
from clsa.ops import Ops
from tests.core import toy_backend
from tests.engine import models

ROOT = Path(__file__).resolve().parents[2]
PARAMS = SamplingParams(max_tokens=20)
PROMPTS: list[Any] = ["def read(path):\n", [7], list(range(300)), models.TEXT]

PROGRAM = """
import json, sys
import clsa

model, prompts, params = json.load(sys.stdin)
info = {info.name: info for info in clsa.backends()}["toy"]
llm = clsa.load(model, backend="toy", engine=clsa.EngineConfig(max_num_seqs=3, max_tokens_per_step=70))
outputs = llm.generate(prompts, clsa.SamplingParams(**params))
again = llm.generate(prompts, clsa.SamplingParams(**params))
print(json.dumps({
    "devices": [device.name for device in info.devices],
    "chosen": [llm.backend, llm.device, llm.why],
    "auto": clsa.load(model).backend,
    "text": [output.text for output in outputs],
    "tokens": [output.token_ids for output in outputs],
    "again": [output.token_ids for output in again],
    "cached": sum(output.cached_tokens for output in again),
    "file": sys.modules["toy_backend"].__file__,
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on which the toy is installed, as pip would do it."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(toy_backend.__file__, site / "toy_backend.py")
    info = site / "somebodys_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[clsa.backends]\ntoy = toy_backend:backend\n")
    return site


def run(site: Path, model: Path) -> dict[str, Any]:
    path = [str(site), *(str(ROOT / part) for part in ("", "backends/mlx", "backends/cuda", "cli"))]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([str(model), PROMPTS, {"max_tokens": PARAMS.max_tokens}]),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("kinds", "pattern", "block"),
    [
        ((models.SLIDING, models.SLIDING, models.CROSS, models.CROSS), "FS", 1),
        ((models.SLIDING, models.FULL, models.CROSS, models.CROSS), "DFS", 4),
    ],
)
def test_a_toy_backend_runs_the_model(site: Path, kinds: tuple[str, ...], pattern: str, block: int) -> None:
    model = models.folder(layer_types=kinds, index_topk_pattern=pattern, index_block_size=block)
    got = run(site, model)
    wanted = models.load("numpy", model).generate(PROMPTS, PARAMS)
    assert got["text"] == [output.text for output in wanted]
    assert got["tokens"] == got["again"] == [output.token_ids for output in wanted]
    assert got["cached"] > 0
    assert got["devices"] == ["cpu"]
    assert got["chosen"] == ["toy", "cpu (the toy of the tests)", "toy on cpu (the toy of the tests) (as asked)"]
    assert got["auto"] != "toy", "auto prefers what it knows"
    assert Path(got["file"]).parent == site


def test_the_toy_is_no_copy_of_the_specification() -> None:
    """What it has of the protocol has the protocol's parameters, and it uses nothing of the specification."""
    functions = {
        n: f for n, f in inspect.getmembers(Ops, inspect.isfunction) if hasattr(toy_backend, n) and n[0] != "_"
    }
    assert len(functions) >= 24
    for name, function in functions.items():
        wanted = list(inspect.signature(function).parameters)[1:]
        assert list(inspect.signature(getattr(toy_backend, name)).parameters) == wanted, name
    modules = {name: str(getattr(value, "__module__", "")) for name, value in vars(toy_backend).items()}
    imported = {name for name, module in modules.items() if module.startswith("clsa.spec")}
    assert not imported and "spec" not in vars(toy_backend)


def test_without_the_entry_point_it_is_unknown() -> None:
    with pytest.raises(Exception, match=r"backend must be 'auto' or one of .*, got 'toy'"):
        models.load("toy", models.folder())


def test_the_models_differ() -> None:
    """The two plans above give different text, so agreeing on both says something."""
    params = replace(PARAMS, ignore_eos=True)
    one = models.load("numpy", models.folder()).generate(PROMPTS, params)
    two = models.load("numpy", models.folder(index_topk_pattern="DD")).generate(PROMPTS, params)
    assert [output.token_ids for output in one] != [output.token_ids for output in two]
