"""`serve`: many requests over the shared engine, as they arrive."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from clsa.bench.bench import Bench
from clsa.bench.checks import wrong_decode, wrong_prefill
from clsa.bench.engine import checked_step, fitting_pages, make_engine
from clsa.bench.report import Column, Report, Row
from clsa.config import MAX_TOKENS, ModelConfig, SamplingParams, check_float, check_int
from clsa.engine import Engine
from clsa.errors import RequestError
from clsa.request import Request
from clsa.residency import num_pages

COLUMNS = [
    Column("plan", "plan"),
    Column("requests", "requests", ","),
    Column("seconds", "seconds", ".2f"),
    Column("requests_per_second", "requests/s", ".2f"),
    Column("input_tokens_per_second", "in tokens/s", ",.0f"),
    Column("output_tokens_per_second", "out tokens/s", ",.1f"),
    *(Column(f"ttft_p{p}", f"TTFT p{p} ms", "ms") for p in (50, 99)),
    *(Column(f"tpot_p{p}", f"TPOT p{p} ms", "ms") for p in (50, 99)),
    *(Column(f"itl_p{p}", f"ITL p{p} ms", "ms") for p in (50, 99)),
    Column("preemptions", "pre-empted", ","),
    Column("note", "note"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What arrives. Lengths are uniform from half to one and a half times their mean; `rate` 0: all at once."""

    requests: int = 64
    input_tokens: int = 1024
    output_tokens: int = 128
    rate: float = 0.0  # arrivals per second, a Poisson process
    max_num_seqs: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("requests", self.requests, 1, 1 << 20, RequestError)
        check_int("input_tokens", self.input_tokens, 1, MAX_TOKENS // 4, RequestError)
        check_int("output_tokens", self.output_tokens, 1, MAX_TOKENS // 4, RequestError)
        check_int("max_num_seqs", self.max_num_seqs, 1, 4096, RequestError)
        check_float("rate", self.rate, 0.0, 1e6, RequestError)

    @property
    def longest(self) -> int:
        """Tokens of the longest request there can be."""
        return _spread(self.input_tokens)[1] + _spread(self.output_tokens)[1]


@dataclass(slots=True)
class _Served:
    """A request, when it arrives, and when each of its tokens came, in seconds since the start."""

    request: Request
    arrival: float
    tokens: list[float] = field(default_factory=list)


def bench_serve(bench: Bench, load: Load) -> Report:
    """Serve the same arrivals with every plan."""
    report = bench.report("serve", COLUMNS, tokens_per_step=bench.settings.tokens_per_step)
    report.facts.update(rate=load.rate, input_tokens=load.input_tokens, output_tokens=load.output_tokens)
    for plan in bench.plans:
        config = bench.config(plan, load.longest)
        length = _spread(load.input_tokens)[1]
        if wrong := wrong_prefill(bench, plan, config, length) or wrong_decode(
            bench, plan, config, load.longest, load.max_num_seqs
        ):
            report.rows.append({"plan": plan, "wrong": wrong, "note": f"WRONG, not timed: {wrong}"})
            report.wrong += 1
            continue
        engine = _engine(bench, config, load)
        bench.note(f"serve: {plan}, {load.requests} requests")
        _serve(engine, _arrivals(engine, load, 2 * load.max_num_seqs, rate=0.0))  # warm: every batch size occurs
        before = engine.stats()["preemptions"]
        served = _arrivals(engine, load, load.requests, load.rate)
        seconds = _serve(engine, served)
        row = {"plan": plan, **summary(served, seconds), "preemptions": engine.stats()["preemptions"] - before}
        report.rows.append(row)
        del engine
    return report


def _engine(bench: Bench, config: ModelConfig, load: Load) -> Engine:
    params = bench.params(config)
    wanted = load.max_num_seqs * num_pages(load.longest)
    pages = fitting_pages(bench.ops, config, bench.dtype, wanted, load.max_num_seqs, bench.stored)
    return make_engine(
        bench.ops,
        params,
        config,
        bench.dtype,
        pages=pages,
        slots=load.max_num_seqs,
        tokens_per_step=bench.settings.tokens_per_step,
        stored=bench.stored,
    )


def _spread(mean: int) -> tuple[int, int]:
    return max(1, mean // 2), mean + mean // 2


def _arrivals(engine: Engine, load: Load, count: int, rate: float) -> list[_Served]:
    rng = np.random.default_rng([load.seed, count])
    times = np.cumsum(rng.exponential(1 / rate, count)) if rate else np.zeros(count)
    served = []
    for arrival in times:
        low, high = _spread(load.input_tokens)
        prompt = rng.integers(0, 250, rng.integers(low, high + 1)).tolist()
        low, high = _spread(load.output_tokens)
        params = SamplingParams(max_tokens=int(rng.integers(low, high + 1)), ignore_eos=True)
        served.append(_Served(engine.make_request(prompt, params), float(arrival)))
    return served


def _serve(engine: Engine, served: list[_Served]) -> float:
    """Run until all are answered; returns the seconds it took."""
    by_request = {one.request: one for one in served}
    coming = iter(sorted(served, key=lambda one: one.arrival))
    following = next(coming, None)
    start = time.perf_counter()
    while following is not None or engine.has_work:
        now = time.perf_counter() - start
        while following is not None and following.arrival <= now:
            engine.add(following.request)
            following = next(coming, None)
        if not engine.has_work:
            assert following is not None  # or the loop had ended
            time.sleep(max(0.0, following.arrival - now))
            continue
        deltas = checked_step(engine)
        now = time.perf_counter() - start
        for delta in deltas:
            if delta.token is not None:
                by_request[delta.request].tokens.append(now)
    return time.perf_counter() - start


def summary(served: list[_Served], seconds: float) -> Row:
    """Throughput, and percentiles of time to first token, time per output token and gaps between tokens."""
    outputs = sum(len(one.tokens) for one in served)
    inputs = sum(one.request.num_prompt_tokens for one in served)
    first = [one.tokens[0] - one.arrival for one in served]
    per_token = [(one.tokens[-1] - one.tokens[0]) / (len(one.tokens) - 1) for one in served if len(one.tokens) > 1]
    gaps = [gap for one in served for gap in np.diff(one.tokens)]
    row: Row = {
        "requests": len(served),
        "seconds": seconds,
        "requests_per_second": len(served) / seconds,
        "input_tokens_per_second": inputs / seconds,
        "output_tokens_per_second": outputs / seconds,
    }
    for name, values in (("ttft", first), ("tpot", per_token), ("itl", gaps)):
        for p in (50, 90, 99):
            row[f"{name}_p{p}"] = float(np.percentile(values, p)) if values else None
    return row
