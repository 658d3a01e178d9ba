"""Figures in documents are those of the committed result files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "clsa" / "assets" / "demo"


def test_the_model_card_of_the_demo() -> None:
    result = json.loads((ROOT / "benchmarks/results/demo/eval.json").read_text(encoding="utf-8"))
    scores = {(row["pattern"], row["length"]): row for row in result["rows"]}
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    rows = [line for line in card.splitlines() if line.startswith("| ") and line[2].isdigit()]
    wanted = []
    for length in (1024, 2048, 4096, 8192):
        clsa, yoco = scores["FSSS", length], scores["DDDD", length]
        assert clsa["tokens"] == yoco["tokens"], "both models are scored on the same windows"
        losses = (yoco["dense"]["loss"], clsa["sparse"]["loss"], clsa["dense"]["loss"])
        covered = (clsa["dense"]["coverage"], clsa["dense"]["coverage_from_k"])
        cells = [f"{length:,}", f"{clsa['tokens']:,}", *(f"{x:.4f}" for x in losses), *(f"{x:.1%}" for x in covered)]
        wanted.append(f"| {' | '.join(cells)} |")
    assert rows == wanted


def test_the_page_about_speed(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "performance_table.py"
    page = tmp_path / "performance.md"
    subprocess.run([sys.executable, str(script), "--out", str(page)], check=True)
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
