"""`select` alone on a GPU, in a minute: checks, then the times of the default tiles and of others.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_select.py [--out result.json] [--defaults]

`--defaults` does no checks and times the default tiles only: that also works with another version of `clsa_cuda` in
front on the PYTHONPATH, to compare with. The exit code is 0 if every check passed and every time was taken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, replace
from itertools import chain
from pathlib import Path

import gpu_correctness
import gpu_timing
import torch

from clsa.bench.report import provenance

COMPILERS = 8
# batch, context, target in ms, k
SHAPES: tuple[tuple[int, int, float | None, int], ...] = (
    (1, 1 << 17, 0.030, 2048),
    (8, 1 << 17, None, 2048),
    (32, 1 << 17, 0.300, 2048),
    (1, 1 << 20, None, 2048),
    (32, 1 << 13, None, 2048),
    (1, 1 << 17, None, 8192),
    (32, 1 << 17, None, 8192),
    (1, 1 << 20, None, 8192),
)


def cases(defaults: bool) -> Iterator[gpu_timing.Case]:
    for batch, length, target, k in SHAPES:
        yield from (case for case in gpu_timing.select_cases(batch, length, target, k) if case.kernel != "torch")
    if not defaults:
        import gpu_tuning

        yield from gpu_tuning.pick_cases()


def compile_share(index: int, defaults: bool) -> None:
    """Run every COMPILERS-th case once, so that its kernels lie compiled on the disk."""
    data = gpu_timing.Data(small=True)
    for case in list(cases(defaults))[index::COMPILERS]:
        gpu_timing.calls(case, case.build, data)[0]()
    torch.cuda.synchronize()


def check() -> int:
    """Run the checks of bfloat16; the number of those that failed."""
    gpu_correctness.poison_empty()
    torch.set_float32_matmul_precision("highest")
    failed = count = 0
    for group in ("select", "select_special"):
        for name, run in gpu_correctness.GROUPS[group]():
            if " bf16 " not in name:
                continue
            count += 1
            try:
                run()
                torch.cuda.synchronize()
            except Exception as error:
                failed += 1
                print(f"CHECK FAILED {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    print(f"{count - failed} of {count} checks passed", flush=True)
    return failed


def recent_cases(data: gpu_timing.Data) -> Iterator[gpu_timing.Case]:
    """The same with the best tokens crowded: the last 4096 of each sequence score three times as widely."""
    pages = data.table[:, -64:].reshape(-1).long()
    data.k_idx.view(-1, 64, gpu_timing.I)[pages] *= 3
    for batch, length, _, k in SHAPES[:3]:
        case = next(gpu_timing.select_cases(batch, length, None, k))
        yield replace(case, name=case.name + " crowded")


def times(defaults: bool, out: Path | None) -> int:
    """Print the table; the number of cases that raised."""
    data = gpu_timing.Data()
    read = gpu_timing.read_bandwidth(data)
    print(f"{torch.cuda.get_device_name()}, reads {read:.0f} GB/s; {gpu_timing.select.__file__}")
    rows, failed = [], 0
    for case in chain(cases(defaults), recent_cases(data)):
        row = {"name": case.name, "target": case.target, "tiles": str(case.tiles)}
        tiles = " ".join(map(str, astuple(case.tiles))) if case.tiles else ""
        try:
            row |= {"ms": gpu_timing.measure(case, data), "floor": case.bytes / read / 1e6}
            target = f"asked {case.target:.3f}" if case.target else ""
            print(f"{case.name:42s} {row['ms']:8.4f} floor {row['floor']:7.4f} {target:12s} {tiles}", flush=True)
        except Exception as error:
            failed += 1
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{case.name:42s} {row['error']} {tiles}", flush=True)
        rows.append(row)
    if out:
        out.write_text(
            json.dumps(provenance() | {"device": torch.cuda.get_device_name(), "read": read, "rows": rows}, indent=1)
        )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--defaults", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "check":
        return check()
    if args.worker:
        compile_share(int(args.worker), args.defaults)
        return 0
    workers = [str(i) for i in range(COMPILERS)] + ([] if args.defaults else ["check"])
    command = [sys.executable, __file__, *(["--defaults"] if args.defaults else []), "--worker"]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        logs = {worker: Path(folder) / worker for worker in workers}
        running = {
            worker: subprocess.Popen([*command, worker], stdout=log.open("wb"), stderr=subprocess.STDOUT)
            for worker, log in logs.items()
        }
        for worker, process in running.items():
            failed += process.wait() != 0
            lines = logs[worker].read_text(errors="replace").splitlines()
            print(*(lines if worker == "check" else lines[-3:]), sep="\n", end="\n" if lines else "")
    return 1 if times(args.defaults, args.out) + failed else 0


if __name__ == "__main__":
    sys.exit(main())
