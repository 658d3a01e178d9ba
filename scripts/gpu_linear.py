"""Time the products of a 4B decode step: cuBLAS and tile sizes of the Triton kernel, side by side.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_linear.py --out result.json [--rows 1,8,32]

Weights rotate through more memory than the L2 cache holds. A variant whose result is wrong is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F

from clsa_cuda.kernels.linear import LinearTiles, linear, linear_tiles
from clsa_cuda.kernels.tiles import limits

SHAPES = {
    "qkv": (3584, 2560),
    "q or o": (2560, 2560),
    "gate and up": (15360, 2560),
    "down": (2560, 7680),
    "head": (151936, 2560),
}
WORKERS = 14


def variants(out_size: int, in_size: int) -> list[LinearTiles]:
    found = []
    for (block_n, block_k), stages, splits in itertools.product(
        ((64, 128), (32, 256), (128, 64), (64, 256), (32, 128), (16, 256)), (4, 6), (1, 2, 4, 8)
    ):
        programs = -(-out_size // block_n) * splits
        shared = block_n * block_k * 2 * (stages - 1)
        if (
            programs >= 130
            and (programs <= 1100 or splits == 1)
            and shared <= 160 << 10
            and in_size // splits >= block_k
        ):
            found.append(LinearTiles(block_n, block_k, splits, 4, stages))
    return found


def cases(rows: list[int]) -> list[tuple[str, int, LinearTiles]]:
    return [(name, m, tiles) for name, (n, k) in SHAPES.items() for m in rows for tiles in variants(n, k)]


def compile_some(index: int, rows: list[int]) -> None:
    for name, m, tiles in cases(rows)[index::WORKERS]:
        n, k = SHAPES[name]
        x, w = (torch.zeros(size, k, device="cuda", dtype=torch.bfloat16) for size in (m, n))
        try:
            linear(x, w, tiles)
        except Exception as error:
            print(name, m, tiles, str(error)[:100])
    torch.cuda.synchronize()


def milliseconds(run: Any, weights: list[torch.Tensor]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / len(weights))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--compile", type=int)
    args = parser.parse_args()
    rows = [int(m) for m in args.rows.split(",")]
    if args.compile is not None:
        return compile_some(args.compile, rows)
    jobs = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--compile", str(i)]) for i in range(WORKERS)]
    for job in jobs:
        job.wait()
    result: list[dict[str, Any]] = []
    torch.manual_seed(0)
    for name, (n, k) in SHAPES.items():
        copies = max(2, (200 << 20) // (n * k * 2))
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for m in rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            want = x.double() @ weights[0].double().T
            row: dict[str, Any] = {"what": name, "rows": m, "mb": n * k * 2 / 1e6}
            row["cublas_ms"] = milliseconds(lambda w: F.linear(x, w), weights)  # noqa: B023
            timed = []
            for tiles in dict.fromkeys([linear_tiles(n, k, limits(x.device)), *variants(n, k)]):
                try:
                    error = ((linear(x, weights[0], tiles) - want).norm() / want.norm()).item()
                    assert error < 6e-3, f"wrong by {error}"
                    timed.append((milliseconds(lambda w: linear(x, w, tiles), weights), str(tiles)))  # noqa: B023
                except Exception as error:
                    row.setdefault("errors", []).append(f"{tiles}: {type(error).__name__}: {error}"[:200])
            row["ours_ms"] = timed[0][0] if timed else None
            row["best"] = sorted(timed)[:5]
            result.append(row)
            best = [f"{ms:.4f} {t[12:-1]}" for ms, t in row["best"][:3]]
            print(
                f"{name:12s} rows {m:2d} {row['mb']:7.1f} MB cublas {row['cublas_ms']:.4f} ours {row['ours_ms']}",
                flush=True,
            )
            print("    " + "\n    ".join(best), len(row.get("errors", [])), "errors", flush=True)
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
