"""Decode steps for many seconds on an NVIDIA GPU: how fast they stay, and what power the card takes for them.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_sustained.py --out sustained.json [--cases clsa:32,yoco:32]

A card at its power limit lowers its clock, which takes about half a second, so what is timed for less is faster than
what a server gets. Power and clock are what `nvidia-smi` says ten times a second; its power is an average of the last
second, so the first seconds are left out of all but `first_ms`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from gpu_decode import Bench  # type: ignore[import-not-found]

from clsa.bench.report import provenance

POWER_CAP = 0x4  # among the reasons for a lower clock
FIRST, SETTLED = 0.3, 3.0  # seconds: before the card has noticed, and after its average of power is of these steps


class Smi:
    """Power in watts, clock in MHz and the reasons for a lower one, ten times a second."""

    def __init__(self) -> None:
        query = ["nvidia-smi", "--query-gpu=power.draw,clocks.sm,clocks_event_reasons.active"]
        query += ["--format=csv,noheader,nounits", "-lms", "100", "-i", str(torch.cuda.current_device())]
        self._process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)

    def stop(self) -> list[tuple[float, float, int]]:
        self._process.terminate()
        lines, _ = self._process.communicate()  # some hundred, which its pipe holds
        whole = lines[: lines.rfind("\n") + 1].splitlines()
        return [(float(watts), float(clock), int(reasons, 16)) for watts, clock, reasons in csv.reader(whole)]


def lasting(bench: Any, seconds: float) -> list[float]:
    """When the tokens of each step were on the host."""
    with closing(bench.arrivals()) as arrivals:
        times = [next(arrivals)]
        while times[-1] - times[0] < seconds:
            times.append(next(arrivals))
    return times


def measure(plan: str, batch: int, seconds: float) -> dict[str, Any]:
    bench = Bench(plan, 131072, batch, 1)
    lasting(bench, 0.2)  # some steps: the first compiles, two record
    time.sleep(2.0)  # the card is at its full clock again
    smi = Smi()
    times = lasting(bench, seconds)
    samples = smi.stop()
    steps = [(end - times[0], (end - start) * 1e3) for start, end in itertools.pairwise(times)]
    settled = [ms for at, ms in steps if at > SETTLED]
    last = samples[round(10 * SETTLED) :]
    watts = statistics.mean(power for power, _, _ in last)
    mean = statistics.mean(settled)
    return {
        "plan": plan,
        "batch": batch,
        "steps": len(steps),
        "first_ms": statistics.median(ms for at, ms in steps if at < FIRST),
        "settled_ms": mean,
        "settled_slowest_tenth_ms": statistics.quantiles(settled, n=10)[-1],
        "watts": watts,
        "sm_mhz": statistics.mean(clock for _, clock, _ in last),
        "power_capped_share": statistics.mean(bool(reasons & POWER_CAP) for _, _, reasons in last),
        "joules_per_token": watts * mean / 1e3 / batch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default="clsa:32,clsa:1,yoco:32,transformer:13")
    parser.add_argument("--seconds", type=float, default=8.0)
    args = parser.parse_args()
    if args.seconds <= SETTLED:
        parser.error(f"--seconds takes more than {SETTLED:g}; got {args.seconds:g}")
    rows: list[dict[str, Any]] = []
    for case in args.cases.split(","):
        plan, batch = case.split(":")
        rows.append(measure(plan, int(batch), args.seconds))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
        result = provenance() | {"device": torch.cuda.get_device_name(), "context": 131072, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
