"""Check the CUDA kernels at real sizes, then time what is right: one table and one JSON file, in three minutes.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_check.py --out result.json [--tune] [--seconds 170]
        [--only gather,sliding]

Checks run side by side in processes of their own, so that a kernel that fails, hangs or breaks its context takes
nothing else with it. A kernel whose check failed is not timed. `--tune` times other tile sizes too. The exit code is 0
if every check passed and every time was taken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from clsa.bench.report import provenance

CHECKS = ("write", "select", "select_special", "gather", "dense", "sliding")
COMPILERS = 9  # processes that compile what will be timed, while the checks run


def run(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=log.open("wb"), stderr=subprocess.STDOUT)


def wait(processes: dict[str, subprocess.Popen[bytes]], deadline: float) -> dict[str, str]:
    """How each process ended: "" for well."""
    ends = {}
    for name, process in processes.items():
        try:
            code = process.wait(max(0.1, deadline - time.monotonic()))
            ends[name] = "" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            ends[name] = "out of time"
    return ends


def tail(path: Path, lines: int = 12) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def parent(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    deadline = begin + args.seconds
    folder = Path(tempfile.mkdtemp())
    extra = ["--tune"] if args.tune else []
    only = args.only.split(",")
    jobs = {name: ["--worker", f"check:{name}", "--out", str(folder / f"{name}.json")] for name in only}
    jobs |= {f"compile{i}": ["--worker", f"compile:{i}", *extra] for i in range(COMPILERS)}
    ends = wait({name: run(job, folder / f"{name}.log") for name, job in jobs.items()}, begin + 0.55 * args.seconds)
    checks: dict[str, Any] = {}
    for name in only:
        path = folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        checks |= found
        if ends[name]:
            checks[f"{name}: process"] = f"{ends[name]}: {tail(folder / f'{name}.log')}"
    checked = time.monotonic() - begin
    failed = {name: text for name, text in checks.items() if text != "ok"}
    bad = sorted({name.split()[0].split(":")[0].removesuffix("_special") for name in failed} | {*CHECKS} - {*only})
    timing = folder / "timing.json"
    job = ["--worker", "time", "--skip", ",".join(bad), "--out", str(timing), *extra]
    job += ["--seconds", str(deadline - time.monotonic() - 12)]
    end = wait({"time": run(job, folder / "time.log")}, deadline)["time"]
    times = json.loads(timing.read_text()) if timing.exists() else {}
    report(checks, failed, times, f"{end}: {tail(folder / 'time.log')}" if end else "")
    print(f"checks {checked:.0f} s, all {time.monotonic() - begin:.0f} s; not timed: {', '.join(bad) or 'none'}")
    if args.out:
        Path(args.out).write_text(json.dumps({**provenance(), "checks": checks, "timing_end": end, **times}, indent=1))
    return 1 if failed or end or any("error" in row for row in times.get("rows", [])) else 0


def report(checks: dict[str, str], failed: dict[str, str], times: dict[str, Any], end: str) -> None:
    for name, text in failed.items():
        print(f"CHECK FAILED {name}: {' '.join(text.split())[-300:]}")
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed; {times.get('device', 'nothing was timed')}")
    if "read" in times:
        print(f"read {times['read']:.0f} GB/s")
    print(f"{'what':44s} {'ms':>9s} {'floor':>8s} {'share':>6s} {'target':>8s}  tiles")
    for row in times.get("rows", []):
        if "error" in row:
            print(f"{row['name']:44s} {row['error'][:160]}")
            continue
        share = f"{row['floor'] / row['ms']:6.1%}" if row["floor"] else " " * 6
        target = f"{row['target']:8.3f}" if row.get("target") else " " * 8
        print(f"{row['name']:44s} {row['ms']:9.4f} {row['floor']:8.4f} {share} {target}  {row.get('tiles', '')}")
    errors = Counter(f"{row['name']}: {row['error'][:150]}" for row in times.get("tuning", []) if "error" in row)
    for text, count in errors.most_common(10):
        print(f"{count} times {text}")
    if end:
        print(f"TIMING ENDED EARLY {end}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--only", default=",".join(CHECKS), help="kernels to check and time, with commas between")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--skip", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := {*args.only.split(",")} - {*CHECKS}:
        parser.error(f"--only takes {', '.join(CHECKS)}; got {', '.join(sorted(unknown))}")
    if args.worker is None:
        return parent(args)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    kind, _, name = args.worker.partition(":")
    if kind == "check":
        import gpu_correctness

        gpu_correctness.run(name, Path(args.out))
    else:
        import gpu_timing

        if kind == "compile":
            gpu_timing.compile_share(int(name), COMPILERS, args.tune)
        else:
            gpu_timing.run(args.skip.split(","), args.tune, Path(args.out), args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
