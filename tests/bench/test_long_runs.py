"""`scripts/gpu_long.py` rehearsed on the CPU, and the pages that are written from its result and the profile's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clsa.bench.sizes import plan_config
from clsa.params import state_bytes_per_token
from scripts.performance_sections import long_lines, profile_lines

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--sizes tiny --device cpu --context 300 --tokens 50 --million 900 --million-steps 12 --requests 3 --answer 20"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("long") / "long.json"
    options = [*SMALL.split(), "--tokens-per-step", "128", "--figure-seconds", "0.001", "--out", str(out)]
    command = [sys.executable, str(ROOT / "scripts" / "gpu_long.py"), "--parts", "answer,million,serve", *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_long_answer_does_not_drift(result: dict[str, Any]) -> None:
    found = result["answer"]
    assert found["finished"] and found["tokens"] == 50
    assert found["drift"]["relative_rms"] < 1e-5 and found["drift"]["same_argmax"]
    assert found["drift"]["sampled_is_argmax"], "the state is the one that the last token was sampled from"


def test_state_of_a_long_context(result: dict[str, Any]) -> None:
    found = result["million"]
    config = plan_config("tiny", "clsa", 1000)
    per_token = state_bytes_per_token(config, "float32")
    assert found["long"]["tokens"] == 900 and found["short"]["tokens"] == 300
    assert 600 * per_token <= found["long"]["state_bytes"] - found["short"]["state_bytes"] <= 664 * per_token
    assert found["step_ratio"] == found["long"]["step_ms"] / found["short"]["step_ms"]


def test_all_requests_are_answered(result: dict[str, Any]) -> None:
    found = result["serve"]
    assert found["finished"] and found["tokens"] == 3 * 20
    assert found["tokens_per_second"] == pytest.approx(60 / found["seconds"])
    assert 0 < found["seconds_until_all_have_a_token"] < found["seconds"]
    assert found["by_the_formula_of_paper"] > 0


def test_the_page_says_what_the_result_says(result: dict[str, Any]) -> None:
    page = "\n".join(long_lines(result))
    assert "An answer of 50 tokens behind 300" in page and "the same best token" in page
    assert f"{result['serve']['tokens_per_second']:,.0f} output tokens/s" in page
    assert f"{result['million']['step_ratio']:.2f} times the one at 300 tokens" in page
    assert len(long_lines({"machine": result["machine"]})) == 4  # nothing was run


def test_the_page_about_kernels() -> None:
    kernel = {"kernel": "_x<a|b>", "what": "unknown", "launches": 32.0, "us": 1234.5, "share": 0.5, "bytes": 0}
    floor = kernel | {"kernel": "_y", "bytes": 2_000_000, "of_floor": 0.876}
    row = {"plan": "clsa", "context": 131072, "batch": 8, "graph_ms": 1.5, "launches": 64.0, "summed_us": 1800.0}
    row |= {"floor_us": 1300.0, "kernels": [kernel | {"of_floor": None}, floor]}
    lines = profile_lines({"device": "D", "torch": "2.11.0", "read_bandwidth": 4.4e12, "rows": [row]})
    assert "| `_x<a b>` | unknown | 32 | 1,234.5 | 50.0% |  |  |" in lines
    assert "| `_y` | unknown | 32 | 1,234.5 | 50.0% | 2.0 | 88% |" in lines
    assert any("takes 1.500 ms, its 64 launches last 1.800 ms together" in line for line in lines)
