"""The core names no array library and no backend, imports run one way, and `import clsa` is quick."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import clsa

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = {"mlx", "mlx_lm", "torch", "triton", "transformers"}
PARTS = {"clsa_mlx", "clsa_cuda", "clsa_cli"}
CORE = sorted((ROOT / "clsa").rglob("*.py"))
PLUG_INS = sorted((ROOT / "backends").rglob("*.py"))
INTEGERS_ONLY = {"pages", "prefix", "residency", "scheduler", "request"}
FOR_BACKENDS = {"clsa.ops", "clsa.config", "clsa.errors", "clsa.hostmemory"}
# The adapter to mlx-lm stands where our engine stands, so it builds steps and runs the model itself.
ADAPTERS = {"mlx_lm_model": {"clsa.batch", "clsa.model", "clsa.params", "clsa.plan"}}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions and type-checking blocks too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "clsa" else (module,)


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_names_no_array_library_and_no_backend(path: Path) -> None:
    assert roots(path) & (LIBRARIES | PARTS) == set()


@pytest.mark.parametrize("path", PLUG_INS, ids=lambda path: str(path.relative_to(ROOT)))
def test_backends_know_only_the_protocol(path: Path) -> None:
    own = path.relative_to(ROOT / "backends").parts[1]
    allowed = FOR_BACKENDS | ADAPTERS.get(path.stem, set())
    assert roots(path) & PARTS <= {own}
    assert {name for name in imported(path) if name.partition(".")[0] == "clsa"} <= allowed


@pytest.mark.parametrize("path", [p for p in CORE if p.stem in INTEGERS_ONLY], ids=lambda path: path.stem)
def test_scheduler_never_sees_an_array(path: Path) -> None:
    names = set(imported(path))
    assert "numpy" not in {name.partition(".")[0] for name in names}
    assert names & {"clsa.ops", "clsa.spec", "clsa.model", "clsa.engine"} == set()


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_no_module_of_the_core_pulls_in_an_array_library() -> None:
    loaded = json.loads(
        run_python(
            "import importlib, json, pkgutil, sys, clsa\n"
            "for module in pkgutil.walk_packages(clsa.__path__, 'clsa.'):\n"
            "    importlib.import_module(module.name)\n"
            "print(json.dumps(sorted(sys.modules)))"
        )
    )
    assert "clsa.ops" in loaded
    assert {name.partition(".")[0] for name in loaded} & (LIBRARIES | PARTS) == set()


def test_import_is_quick() -> None:
    code = "import time; start = time.perf_counter(); import clsa; print(time.perf_counter() - start)"
    seconds = [float(run_python(code)) for _ in range(5)]
    assert min(seconds) < 0.3, f"import clsa took {min(seconds):.2f} s at best"


def test_public_names_resolve() -> None:
    for name in clsa.__all__:
        assert getattr(clsa, name) is not None
        assert name in dir(clsa)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = clsa.nothing
