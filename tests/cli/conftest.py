"""The command line in this process with a fake model, and in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import clsa
from clsa_cli.main import app
from tests.cli.fake import FakeLLM

ROOT = Path(__file__).resolve().parents[2]
PATH = [str(ROOT), *(str(ROOT / part) for part in ("backends/mlx", "backends/cuda", "cli"))]

Run = Callable[..., Any]
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def run() -> Run:
    """`run("generate", "--prompt", "x", stdin=...)` -> result with exit_code, stdout, stderr."""

    def run(*args: str, stdin: str | bytes | None = None) -> Any:
        return CliRunner().invoke(app, list(args), input=stdin)

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """Whatever is loaded is this model."""
    llm = FakeLLM()
    monkeypatch.setitem(vars(clsa), "load", llm.load)
    return llm


@pytest.fixture
def start() -> Start:
    """Start `clsa` in a process of its own; `fake` is the Python text of the model it loads."""

    def start(*args: str, fake: str = "FakeLLM()", **options: Any) -> subprocess.Popen[bytes]:
        code = (
            # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
            "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "import clsa\nfrom tests.cli.fake import FakeLLM\nfrom clsa_cli.main import main\n"
            f"clsa.load = {fake}.load\nmain()"
        )
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(PATH)}
        return subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, env=environment, **(streams | options))

    return start
