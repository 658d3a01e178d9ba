"""Profile decode steps of the 4B sizes on an NVIDIA GPU: every kernel above one percent, beside its own floor.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_profile.py --out benchmarks/results/h200/profile.json

The step is the CUDA graph that the engine replays. Kernels of a step may overlap, as the next is launched before the
last one ends, so their durations add up to more than the step takes: `graph_ms` is timed without the profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from gpu_decode import Bench, config_4b, measured_read_bandwidth, timed
from step_profile import Launch, step_profile

import clsa_cuda
from clsa.bench.report import provenance
from clsa.bench.step_gate import step_gate

STEPS = 5


def launches(replay: Any, steps: int) -> list[Launch]:
    """All kernels of so many replays."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(steps):
            replay()
        torch.cuda.synchronize()
    return [
        Launch(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in prof.events()
        if event.device_type == DeviceType.CUDA
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--plan", default="clsa")
    args = parser.parse_args()
    if wrong := step_gate(clsa_cuda.backend.open("cuda"), config_4b(args.plan), "bfloat16"):
        raise SystemExit(f"nothing is timed: a step of {args.plan}, {wrong}")
    read = measured_read_bandwidth()
    rows = []
    for batch in map(int, args.batches.split(",")):
        bench = Bench(args.plan, args.context, batch, 1)
        times = bench.run(20)
        graph = next(g.graph for g in bench.recorder._graphs.values() if g.graph is not None)
        replays = statistics.median(timed(graph.replay, 100)) * 1e3
        found = step_profile(launches(graph.replay, STEPS), STEPS, bench.config, args.context, batch, 2, read)
        rows.append({"plan": args.plan, "context": args.context, "batch": batch, **times, "graph_ms": replays, **found})
        show(rows[-1])
        del bench, graph
        torch.cuda.empty_cache()
    result = provenance() | {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    result |= {"read_bandwidth": read, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def show(row: dict[str, Any]) -> None:
    print(
        f"batch {row['batch']}: step {row['graph_ms']:.3f} ms, some kernel runs {row['busy_us'] / 1e3:.3f} ms, "
        f"durations add up to {row['summed_us'] / 1e3:.3f} ms, floor {row['floor_us'] / 1e3:.3f} ms",
        flush=True,
    )
    for kernel in row["kernels"]:
        floor = "" if kernel["of_floor"] is None else f"{kernel['of_floor']:.1%} of floor"
        moved = f"{kernel['bytes'] / 1e6:9.1f} MB {floor:16s}"
        times = f"{kernel['us']:9.1f} us {kernel['share']:6.1%} {kernel['launches']:5.0f}x"
        print(f"  {times} {moved} {kernel['kernel'][:50]}: {kernel['what']}")


if __name__ == "__main__":
    main()
