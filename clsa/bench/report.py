"""What a benchmark returns, and what goes to a file beside it: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clsa.ops import Ops

_LIBRARIES = ("clsa", "numpy", "mlx", "mlx-lm", "torch", "triton", "transformers")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table: the key of a row, its title, and how a number is shown."""

    key: str
    title: str
    form: str = ""  # a format specification, or "ms", "GB", "%"


@dataclass(slots=True)
class Report:
    """Rows in the order they were measured; `facts` hold for all of them. `wrong` counts results that failed."""

    name: str
    columns: Sequence[Column]
    facts: Row
    rows: list[Row] = field(default_factory=list)
    wrong: int = 0


def machine(ops: Ops | None) -> Row:
    """What it ran on, in words that name no computer, and how busy the host was before."""
    return {
        "device": "host" if ops is None else ops.device,
        "backend": None if ops is None else ops.name,
        "host": f"{os.cpu_count()} {platform.machine().replace('_', '-')} cores, {platform.system()}",
        "load_average": round(os.getloadavg()[0], 1),
    }


def versions() -> dict[str, str]:
    """Python, and the libraries that this process has loaded."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        if name.replace("-", "_") in sys.modules:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "unknown"
    return found


def result(report: Report, command: Sequence[str]) -> Row:
    """The content of a result file."""
    return {"benchmark": report.name, **provenance(command), **report.facts, "rows": report.rows}


def provenance(command: Sequence[str] | None = None) -> Row:
    """Where a result comes from: the command (None: of this process), the commit, the day (UTC), the versions."""
    return {
        "command": " ".join(sys.argv if command is None else command),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": versions(),
    }


def commit() -> str | None:
    """The git commit this package was run from, with "+" if changed since; None outside of a checkout or archive."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "report.py")
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return archived(folder.parents[1])


def archived(root: Path) -> str | None:
    """The commit that `git archive` wrote into .git_archival.txt; whether it was changed since, nothing says."""
    try:
        text = (root / ".git_archival.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return text[:12] if re.fullmatch("[0-9a-f]{40}", text) else None
