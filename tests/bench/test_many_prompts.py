"""`scripts/gpu_batch.py` rehearsed on the CPU, and the lines of the page that are written from its result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.performance_sections import batch_lines

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--sizes tiny --device cpu --requests 8 --prompt 40 --answer 30 --cases 4x64,2x32"


def test_many_prompts(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "batch.json"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_batch.py"), *SMALL.split(), "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert [(row["together"], row["tokens_per_step"]) for row in result["rows"]] == [(4, 64), (2, 32)]
    for row in result["rows"]:
        assert 8 * 15 <= row["tokens"] <= 8 * 30 and row["prompt_tokens"] == 8 * 40
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0 < row["full_step_ms"] < 1e3 * row["seconds"]
    page = batch_lines(result)
    assert f"| 4 | 64 | {result['rows'][0]['tokens_per_second']:,.0f} |" in "\n".join(page)
