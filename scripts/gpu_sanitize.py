"""The kernel tests on an NVIDIA GPU under compute-sanitizer: reads and writes out of bounds, races, barriers.

    PYTHONPATH=.:backends/mlx:backends/cuda:cli python3 scripts/gpu_sanitize.py --out sanitize.json [--tests float8]

Run the tests without it first (`pytest tests/cuda`): then the kernels are compiled, and what is wrong is wrong by the
tool's account alone. Memory is taken from the driver tensor by tensor, so that the next tensor does not hide an
access past the end. A job that finds nothing because nothing ran counts as failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clsa.bench.report import commit

DTYPES = ("float32", "float16 and not bfloat16", "bfloat16")
OTHERS = "not float32 and not float16 and not bfloat16"
BY_DTYPE = ("attention", "prefill", "select", "fused", "write")
WHOLE = ("float8", "greedy", "ops", "ring", "sample")
# The kernels with several warps at work on shared memory, and which of their tests.
RACES = dict.fromkeys(("attention", "float8", "prefill", "select", "fused", "ring"), "bfloat16") | {"sample": ""}
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_PASSED = re.compile(r"(\d+) passed")


def jobs() -> Iterator[tuple[str, str, str]]:
    """(tool, file of tests, which of them)"""
    for name in BY_DTYPE:
        for dtype in (*DTYPES, OTHERS):
            yield "memcheck", name, dtype
    for name in WHOLE:
        yield "memcheck", name, ""
    for tool in ("racecheck", "synccheck"):
        for name, which in RACES.items():
            yield tool, name, which


def run(job: tuple[str, str, str], logs: Path, deadline: float) -> dict[str, Any]:
    tool, name, which = job
    log = logs / f"{tool}-{name}-{which.replace(' ', '_') or 'all'}.txt"
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", "--error-exitcode", "9", sys.executable]
    command += ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/cuda/test_kernel_{name}.py"]
    command += ["-k", which] if which else []
    begin = time.monotonic()
    row: dict[str, Any] = {"tool": tool, "tests": name, "which": "other" if which == OTHERS else which or "all"}
    row["commit"] = commit()
    if begin > deadline:
        return row | {"end": "not started"}
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("wb") as file:
        try:
            left = deadline - begin
            done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=left)
            row["end"] = f"exit code {done.returncode}" if done.returncode not in (0, 5) else ""
        except subprocess.TimeoutExpired:
            row["end"] = "out of time"
    text = log.read_text(errors="replace")
    found = [int(a or b) for a, b in _SUMMARY.findall(text)]
    passed = _PASSED.search(text)
    row |= {"passed": int(passed[1]) if passed else 0, "seconds": time.monotonic() - begin}
    return row | {"errors": sum(found) if found else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, help="a folder; by default beside --out")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--tests", default="", help="only of these kernels, with commas; other rows of --out stay")
    args = parser.parse_args()
    chosen = args.tests.split(",") if args.tests else [*BY_DTYPE, *WHOLE]
    if unknown := set(chosen) - {*BY_DTYPE, *WHOLE}:
        parser.error(f"--tests takes {', '.join((*BY_DTYPE, *WHOLE))}; got {', '.join(sorted(unknown))}")
    logs = args.logs or args.out.with_suffix(".logs")
    logs.mkdir(parents=True, exist_ok=True)
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=True).stdout
    deadline = time.monotonic() + args.seconds
    with ThreadPoolExecutor(args.workers) as pool:
        rows = list(pool.map(lambda job: run(job, logs, deadline), (job for job in jobs() if job[1] in chosen)))
    if args.tests and args.out.exists():
        before = json.loads(args.out.read_text())["rows"]
        rows += [row for row in before if row["tests"] not in chosen]
    import torch

    args.out.write_text(
        json.dumps(
            {"device": torch.cuda.get_device_name(0), "version": version.split("\n")[-2], "rows": rows}, indent=1
        )
    )
    for row in rows:
        print(f"{row['tool']:10s} {row['tests']:10s} {row['which']:10s} {row.get('passed', 0):5d} passed, ", end="")
        print(f"{row.get('errors')} errors, {row.get('seconds', 0):.0f} s {row['end']}")
    return 0 if all(row.get("passed") and row.get("errors") == 0 and not row["end"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
