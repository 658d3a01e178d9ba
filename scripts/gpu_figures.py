"""Run everything that docs/performance.md is made of on an NVIDIA GPU, one after the other.

    PYTHONPATH=.:backends/mlx:backends/cuda:cli python3 scripts/gpu_figures.py [--out benchmarks/results/h200]
        [--only decode,paper] [--seconds 600]

Each part runs in a process of its own and writes files of its own, so that one that fails or takes too long costs only
itself. Afterwards, anywhere: `python scripts/performance_table.py` and `python scripts/figures.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

BENCH = "-m clsa_cli bench"
LONG = "131072"
# part -> what follows `python3`, and the seconds it may take; {out} is the folder
PARTS = {
    "decode": ("scripts/gpu_decode.py --out {out}/decode.json", 90),
    "check": ("scripts/gpu_check.py --out {out}/kernels.json --seconds 170", 180),
    "profile": ("scripts/gpu_profile.py --out {out}/profile.json", 60),
    "layers": ("scripts/gpu_layers.py --defaults --out {out}/layers.json", 30),
    "fp8": (
        "scripts/gpu_decode.py --out {out}/decode_fp8.json --batches 1,8,32 --fp8 weights,kv+index,weights+kv+index",
        90,
    ),
    "baselines": ("scripts/gpu_decode.py --out {out}/decode_baselines.json --plans yoco,transformer --batches 1", 60),
    "capacity": (
        f"{BENCH} capacity --backend cuda --contexts {LONG} --plans transformer,yoco,clsa --seconds 0.3 --no-peers "
        "--output {out}/capacity.json",
        120,
    ),
    "paper": (
        f"{BENCH} paper --backend cuda --contexts 8192,32768,{LONG} --batches 32 --tokens-per-step 8192 --seconds 0.3 "
        "--output {out}/paper.json",
        300,
    ),
    "ops": (
        f"{BENCH} ops --backend cuda --contexts {LONG} --batches 1,8,32 --seconds 0.1 --output {{out}}/ops.json",
        120,
    ),
    "prefill": ("scripts/gpu_prefill.py --skip engine --out {out}/prefill_kernels.json", 150),
    "prefill_engine": ("scripts/gpu_prefill.py --skip checks,kernels --out {out}/prefill_engine.json", 60),
    "sustained": ("scripts/gpu_sustained.py --out {out}/sustained.json", 90),
    "long": ("scripts/gpu_long.py --parts answer --out {out}/long.json", 150),
    "serve": ("scripts/gpu_long.py --parts serve --out {out}/served.json", 200),
    "million": ("scripts/gpu_long.py --parts million --out {out}/million.json", 90),
    "sanitize": ("scripts/gpu_sanitize.py --seconds 240 --out {out}/sanitize.json --logs runs/sanitizer", 260),
    "distill": ("scripts/gpu_distill.py --out {out}/distill.json", 90),
    "warm": ("scripts/gpu_warm.py --out {out}/warm.json", 90),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200"))
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between, in the order they run")
    parser.add_argument("--seconds", type=float, default=3600.0, help="in all; no part starts after that")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only takes {', '.join(PARTS)}; got {', '.join(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    begin, failed = time.monotonic(), []
    for part in parts:
        command, limit = PARTS[part]
        left = args.seconds - (time.monotonic() - begin)
        if left <= 0 or not _run(part, [sys.executable, *command.format(out=args.out).split()], min(limit, left)):
            failed.append(part)
    print(f"failed or out of time: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _run(part: str, command: list[str], limit: float) -> bool:
    start = time.monotonic()
    try:
        code = subprocess.run(command, timeout=limit, check=False).returncode
        end = "" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        end = f"not finished after {limit:.0f} s"
    print(f"== {part}: {time.monotonic() - start:.0f} s {end}", flush=True)
    return not end


if __name__ == "__main__":
    sys.exit(main())
