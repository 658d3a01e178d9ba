"""`scheduler`: what a step costs the host before any array is made."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from itertools import count

from clsa.bench.report import Column, Report, machine
from clsa.config import PAGE_SIZE, SamplingParams, check_int
from clsa.errors import RequestError
from clsa.request import Request
from clsa.residency import num_pages
from clsa.scheduler import Scheduler

TARGET_SECONDS = 50e-6
COLUMNS = [
    Column("load", "load"),
    Column("running", "running", ","),
    Column("waiting", "waiting", ","),
    Column("steps", "steps", ","),
    Column("median_seconds", "median us", "us"),
    Column("mean_seconds", "mean us", "us"),
    Column("p99_seconds", "p99 us", "us"),
    Column("target_seconds", "target us", "us"),
]
_CONTEXT = 1024


def bench_scheduler(running: int = 32, waiting: int = 10_000, steps: int = 5000) -> Report:
    """Seconds of `schedule` and `complete` per step, without arrays.

    "decode": the running requests go on, nobody comes or goes. "arrivals": each request ends after 32 tokens, the next
    of the queue is admitted with a prompt of its own, and a new one arrives for it; with the prefix cache and without.
    """
    check_int("running", running, 1, 4096, RequestError)
    check_int("waiting", waiting, 0, 1 << 20, RequestError)
    check_int("steps", steps, 10, 1 << 20, RequestError)
    report = Report("scheduler", COLUMNS, {"machine": machine(None)})
    for load, answer, cached in (("decode", 1 << 20, 0), ("arrivals", 32, 0), ("arrivals, prefix cache", 32, None)):
        seconds = _steps(running, waiting, steps, answer, cached)
        report.rows.append(
            {
                "load": load,
                "running": running,
                "waiting": waiting,
                "steps": steps,
                "median_seconds": statistics.median(seconds),
                "mean_seconds": statistics.fmean(seconds),
                "p99_seconds": statistics.quantiles(seconds, n=100)[98],
                "target_seconds": TARGET_SECONDS,
            }
        )
    return report


def _steps(running: int, waiting: int, steps: int, answer: int, cached: int | None) -> list[float]:
    rng, ids = random.Random(0), count()
    pages_each = num_pages(_CONTEXT + min(answer, steps + 64)) + 1
    scheduler = Scheduler(
        num_pages=running * pages_each,
        num_slots=running,
        num_snapshots=0 if cached == 0 else 2 * running,
        max_tokens_per_step=2048,
        max_model_len=pages_each * PAGE_SIZE,
        window=512,
        max_waiting=waiting + running + 1,
        max_cached_pages=cached,
    )
    longest = pages_each * PAGE_SIZE - _CONTEXT

    def arrive() -> None:
        prompt = [rng.randrange(32_000) for _ in range(rng.randrange(1, _CONTEXT))]
        scheduler.add(Request(f"{next(ids)}", prompt, SamplingParams(max_tokens=min(answer, longest))))

    for _ in range(running + waiting):
        arrive()
    return _timed(scheduler, running + waiting, steps, arrive)


def _timed(scheduler: Scheduler, population: int, steps: int, arrive: Callable[[], None]) -> list[float]:
    seconds: list[float] = []
    warm_up = 64  # until all slots are taken
    before = scheduler.schedule()
    for step in range(warm_up + steps):
        start = time.perf_counter()
        plan = scheduler.schedule()  # one step ahead, as the engine does
        if before is not None:
            scheduler.complete(before, [5] * sum(chunk.wants_logits for chunk in before.chunks))
        if step >= warm_up:
            seconds.append(time.perf_counter() - start)
        before = plan
        stats = scheduler.stats()
        for _ in range(population - stats["running"] - stats["waiting"]):
            arrive()
    return seconds
