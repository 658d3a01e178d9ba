"""What a decode step of the engine takes beside its CUDA graph, on an NVIDIA GPU, and what the device does meanwhile.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_gap.py [--out gap.json] [--batches 1,8,32]

`graph`: one replay between two events. `chained`: replays without anything between them, so that what a step takes
above it is copies and the host. `engine`: from one step's tokens on the host to the next one's, one step ahead.
`host`: what the host does for a step while it waits for nothing. The trace slows what it shows: it tells what runs
between two graphs, not how long that is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_decode import Bench, timed  # type: ignore[import-not-found]

from clsa.bench.report import provenance

COPIES = ("Memcpy HtoD", "Memcpy DtoH")
LAST = "_greedy_kernel"  # of the project's kernels in a graph; after it and before the first come a few of torch


def clocked(run: Any, *args: Any) -> tuple[float, Any]:
    """Milliseconds of the host, and the result."""
    begin = time.perf_counter()
    result = run(*args)
    return (time.perf_counter() - begin) * 1e3, result


def host_ms(bench: Any, steps: int) -> dict[str, float]:
    """Medians, with the device idle at the start of each step."""
    times: dict[str, list[float]] = {"inputs": [], "recorder": [], "fetch": []}
    previous = None
    for i in range(steps):
        torch.cuda.synchronize()
        inputs_ms, inputs = clocked(bench.inputs, i)
        recorder_ms, (sampled, _) = clocked(bench.recorder, inputs, previous, bench.state)
        previous = sampled.tokens
        fetch_ms, wait = clocked(bench.ops.fetch, [previous])
        wait()
        for name, ms in zip(times, (inputs_ms, recorder_ms, fetch_ms), strict=True):
            times[name].append(ms)
    return {name: statistics.median(x) for name, x in times.items()}


def first_step(bench: Any, i: int) -> None:
    _, wait = bench.step(i, None)
    wait()
    torch.cuda.synchronize()


def chain(replays: list[Any]) -> None:
    for replay in replays:
        replay()


def between_graphs(bench: Any, steps: int) -> dict[str, Any]:
    """From the sampler of a step to the first product of the next: time in which no kernel runs, and all that ran."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        previous, wait = bench.step(0, None)
        for i in range(1, steps):
            previous, wait = bench.step(i, previous)
        wait()
    events = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    idle, listed = [], []
    for at in [i for i, e in enumerate(events) if e.name.startswith(LAST)][1:-1]:
        start = events[at].time_range.start
        after = next(event for event in events[at + 1 :] if event.name.startswith("_")).time_range.start
        inside = [event for event in events if start - 20 <= event.time_range.start <= after]
        busy_until, gap = events[at].time_range.end, 0.0
        for event in (e for e in inside if e.time_range.start > start and not e.name.startswith(COPIES)):
            gap += max(0.0, event.time_range.start - busy_until)
            busy_until = max(busy_until, event.time_range.end)
        idle.append(gap)
        spans = [(e.time_range.start - start, e.time_range.end - start, e.device_resource_id, e.name) for e in inside]
        listed.append(spans)
    return {"idle_us": statistics.median(idle), "events": listed[len(listed) // 2]}


def measure(batch: int) -> dict[str, Any]:
    bench = Bench("clsa", 131072, batch, 1)
    first = [clocked(first_step, bench, i)[0] for i in range(3)]  # the second and the third record
    replays = [recording.graph.replay for recording in bench.recorder._graphs.values()]
    graph = statistics.median([x for replay in replays for x in timed(replay, 50)]) * 1e3
    chained = statistics.median(timed(partial(chain, 25 * replays), 5)) * 1e3 / (25 * len(replays))
    engine = bench.run(100)["engine_step_ms"]
    row = {"batch": batch, "graph_ms": graph, "chained_ms": chained, "engine_ms": engine, "gap": engine / graph - 1}
    return row | {"host_ms": host_ms(bench, 30), "first_steps_ms": first, **between_graphs(bench, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batches", default="1,8,32")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for batch in map(int, args.batches.split(",")):
        rows.append(measure(batch))
        print({name: value for name, value in rows[-1].items() if name != "events"}, flush=True)
        for start, end, stream, name in rows[-1]["events"]:
            print(f"    {start:8.1f} to {end:8.1f} us, stream {stream}: {name[:70]}")
        torch.cuda.empty_cache()
        if args.out is not None:
            result = provenance() | {"device": torch.cuda.get_device_name(), "rows": rows}
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
