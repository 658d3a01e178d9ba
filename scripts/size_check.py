"""List files and functions that outgrew the house's sizes. Informational: the exit status is 0.

Run as: python scripts/size_check.py
"""

from __future__ import annotations

import ast
from pathlib import Path

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("clsa", "backends", "cli", "scripts", "tests")


def oversized(path: Path) -> list[str]:
    """The findings of one Python file, each `path:line: what`."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    found = []
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        found.append(f"{name}:1: {lines} lines (at most {MAX_FILE_LINES})")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                what = f"{node.name} has {length} lines (at most {MAX_FUNCTION_LINES})"
                found.append(f"{name}:{node.lineno}: {what}")
    return found


def main() -> None:
    paths = sorted(path for source in SOURCES for path in (ROOT / source).rglob("*.py"))
    findings = [finding for path in paths for finding in oversized(path)]
    print("\n".join(findings) if findings else f"sizes: {len(paths)} files, all within bounds")


if __name__ == "__main__":
    main()
