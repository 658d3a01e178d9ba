"""Long runs through the engine: an answer of 30,000 tokens, a context of a million, 32 prompts of 128K with answers.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_long.py --out long.json --parts answer,million,serve,plans
    python scripts/gpu_long.py --out /tmp/long.json --sizes tiny --device cpu --tokens 50 --context 300   # a rehearsal

Weights and prompts are random. Each part ends by itself after `--seconds` and says how far it came.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clsa.batch import SequenceChunk, build_batch
from clsa.bench.bench import Bench, Params, Settings
from clsa.bench.checks import wrong_decode, wrong_prefill
from clsa.bench.engine import checked_step, free_bytes, make_engine, random_prompts
from clsa.bench.paper import end_to_end
from clsa.bench.report import machine, provenance
from clsa.bench.runs import bench_decode
from clsa.bench.steps import prefill_row
from clsa.config import PAGE_SIZE, ModelConfig, SamplingParams
from clsa.engine import Engine
from clsa.errors import ClsaError
from clsa.model import forward, new_state
from clsa.plan import make_plan
from clsa.request import Request
from clsa.residency import num_pages
from clsa.sizing import state_bytes

PLAN, SHORT = "clsa", 8192
Row = dict[str, Any]


class Run:
    """What all parts share: the device, its weights, the sizes of the task."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        settings = Settings(
            backend="cuda",
            device=args.device,
            sizes=args.sizes,
            contexts=(args.context,),
            batches=(args.requests,),
            seconds=args.figure_seconds,
            tokens_per_step=args.tokens_per_step,
            peers=False,
        )
        self.bench = Bench(settings, lambda text: print(f"  {text}", file=sys.stderr, flush=True))
        self.ops, self.dtype = self.bench.ops, self.bench.dtype
        self.params: Params = self.bench.params(self.bench.config(PLAN, args.context))
        self.on_gpu = not self.ops.device.startswith("cpu")

    def engine(self, config: ModelConfig, sequences: int) -> Engine:
        pages = sequences * num_pages(config.max_position_embeddings)
        needed, free = state_bytes(self.ops, make_plan(config), self.dtype, pages, sequences), free_bytes(self.ops)
        if needed > free:
            raise ClsaError(f"the state needs {needed:,} bytes and {free:,} are free; lower --context or --requests")
        sizes = {"pages": pages, "slots": sequences, "tokens_per_step": self.args.tokens_per_step}
        return make_engine(self.ops, self.params, config, self.dtype, **sizes)

    def request(self, engine: Engine, prompt: list[int], answer: int) -> Request:
        request = engine.make_request(prompt, SamplingParams(max_tokens=answer, ignore_eos=True))
        engine.add(request)
        return request

    def memory(self) -> Row:
        """Bytes on the device, and of this process on the host."""
        row: Row = {"host_resident": _resident_bytes()}
        if self.on_gpu:
            import torch

            row |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        return row

    def check(self, config: ModelConfig, length: int, batch: int) -> None:
        wrong = wrong_prefill(self.bench, PLAN, config, length) or wrong_decode(self.bench, PLAN, config, length, batch)
        if wrong:
            raise ClsaError(f"nothing is timed: {wrong}")


# -- a long answer ---------------------------------------------------------------------------------------------------


def answer(run: Run) -> Row:
    """Greedy tokens after a long prompt: times, memory, and whether the state has drifted from a fresh prefill."""
    context, wanted = run.args.context, run.args.tokens
    config = run.bench.config(PLAN, context + wanted + 1)
    run.check(config, context, 1)
    engine = run.engine(config, 1)
    (prompt,) = random_prompts(1, context, seed=11)
    request = run.request(engine, prompt, wanted)
    begin, times, pages, slot, before = time.perf_counter(), [], [0], 0, run.memory()
    warm = min(100, wanted // 4)  # steps until shapes are recorded and every buffer is there
    while engine.has_work and time.perf_counter() - begin < run.args.seconds:
        start = time.perf_counter()
        if checked_step(engine):
            times.append(time.perf_counter() - start)
        pages, slot = list(request.pages) or pages, max(request.window_slot, 0)
        if len(times) == warm:
            before = run.memory()
    after = run.memory()
    finished = not engine.has_work
    edge = min(1000, len(times) // 3)
    row = {
        "context": context,
        "tokens": len(request.tokens) - context,
        "finished": finished,
        "first_steps_ms": float(np.median(times[warm : warm + edge])) * 1e3,
        "last_steps_ms": float(np.median(times[-edge:])) * 1e3,
        "steps_compared": edge,
        "memory_before": before,
        "memory_after": after,
    }
    return row | {"drift": _drift(run, engine, config, request.tokens, pages, slot)} if finished else row


def _drift(run: Run, engine: Engine, config: ModelConfig, tokens: list[int], pages: list[int], slot: int) -> Row:
    """The last step's logits from the state that decoding left behind, against fresh prefills of the same tokens.

    Prefill and decode round differently, and so do two prefills in steps of different lengths: their difference is
    what to compare with.
    """
    runner, known = engine._runner, tokens[:-1]  # the last token was sampled and never an input
    kept = runner._state
    assert kept is not None
    last = SequenceChunk(known[-1:], len(known) - 1, pages, slot, "last")
    batch = build_batch(run.ops, [last], config.sliding_window)
    decoded = run.ops.to_numpy(forward(run.ops, run.params, make_plan(config), batch, kept)[0])[0]
    step = run.args.tokens_per_step
    fresh, other = (_prefilled(run, config, known, size) for size in (step, max(1, step // 2)))
    return {
        "relative_rms": _relative(decoded, fresh),
        "relative_rms_of_two_prefills": _relative(other, fresh),
        "same_argmax": bool(decoded.argmax() == fresh.argmax()),
        "sampled_is_argmax": bool(decoded.argmax() == tokens[-1]),
        "margin_of_argmax": float(np.diff(np.sort(fresh)[-2:])[0]),
        "rms_of_difference": float(np.sqrt(np.mean((decoded - fresh) ** 2))),
    }


def _prefilled(run: Run, config: ModelConfig, tokens: list[int], step: int) -> np.ndarray:
    """Logits of the last token, float32 [V]."""
    plan, pages = make_plan(config), range(num_pages(len(tokens)))
    state, logits = new_state(run.ops, plan, len(pages) * PAGE_SIZE, 1, run.dtype), None
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        chunk = SequenceChunk(part, start, pages, 0, "last" if start + step >= len(tokens) else "none")
        batch = build_batch(run.ops, [chunk], config.sliding_window)
        logits, state = forward(run.ops, run.params, plan, batch, state)
    result: np.ndarray = run.ops.to_numpy(logits)[0]
    return result


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


# -- a long context --------------------------------------------------------------------------------------------------


def million(run: Run) -> Row:
    """A prompt of `--million` tokens: prefill, bytes of state, and steps behind it beside steps behind a short one."""
    long, short = run.args.million, min(SHORT, run.args.context)
    row: Row = {}
    for name, length in (("short", short), ("long", long)):
        config = run.bench.config(PLAN, length + run.args.million_steps + 1)
        run.check(config, min(length, run.args.context), 1)
        engine = run.engine(config, 1)
        for _ in range(3 if length == short else 1):  # compiled for this length, and what is recorded recorded twice
            _finish_prompt(run, engine, random_prompts(1, length, seed=1)[0])
        request = run.request(engine, random_prompts(1, length, seed=2)[0], run.args.million_steps)
        start, times = time.perf_counter(), []
        while not checked_step(engine):
            pass
        prefill = time.perf_counter() - start
        while engine.has_work:
            start = time.perf_counter()
            checked_step(engine)
            times.append(time.perf_counter() - start)
        assert len(request.tokens) == length + run.args.million_steps
        size = state_bytes(run.ops, make_plan(config), run.dtype, num_pages(length), 1)
        row[name] = {
            "tokens": length,
            "prefill_seconds": prefill,
            "prefill_tokens_per_second": length / prefill,
            "step_ms": float(np.median(times[len(times) // 4 : -1])) * 1e3,
            "state_bytes": size,
            "state_bytes_per_token": size / length,
            "memory": run.memory(),
        }
        del engine, request
    return row | {"step_ratio": row["long"]["step_ms"] / row["short"]["step_ms"]}


def _finish_prompt(run: Run, engine: Engine, prompt: list[int]) -> None:
    run.request(engine, prompt, 4)
    while engine.has_work:
        checked_step(engine)


# -- many long requests ----------------------------------------------------------------------------------------------


def serve(run: Run) -> Row:
    """All requests at once, prompts and answers to the end; beside it what the formula of `clsa bench paper` says.

    Other prompts of the same number and length go first, until each has a token: by then every kernel is compiled that
    steps with prompts and any number of answers in them need.
    """
    context, count, wanted = run.args.context, run.args.requests, run.args.answer
    config = run.bench.config(PLAN, context + wanted + 1)
    run.check(config, context, count)
    engine = run.engine(config, count)
    rehearsal, _ = _serve_all(run, engine, random_prompts(count, context, seed=3), wanted, rehearse=True)
    row, alone = _serve_all(run, engine, random_prompts(count, context, seed=4), wanted)
    del engine
    row |= {"context": context, "requests": count, "answer": wanted}
    row["formula"] = "output tokens of all requests / seconds from the first request to the last token"
    row["rehearsal_seconds_until_all_have_a_token"] = rehearsal["seconds_until_all_have_a_token"]
    return row | (_by_formula(run, config, alone) if alone else {})


def _serve_all(
    run: Run, engine: Engine, prompts: Sequence[Any], wanted: int, rehearse: bool = False
) -> tuple[Row, list[float]]:
    """What was served, and the seconds of the steps behind those that still had prompts in them.

    `rehearse` ends all requests as soon as each has a token.
    """
    count, context = len(prompts), len(prompts[0])
    requests = [run.request(engine, prompt, wanted) for prompt in prompts]
    start, steps, first, tokens = time.perf_counter(), [], {}, 0
    while engine.has_work and time.perf_counter() - start < run.args.seconds:
        begin = time.perf_counter()
        deltas = [delta for delta in checked_step(engine) if delta.token is not None]
        now = time.perf_counter() - start
        tokens += len(deltas)
        first |= {delta.request.id: now for delta in deltas if delta.request.id not in first}
        if len(deltas) == count and len(first) == count:
            steps.append(now + start - begin)
        if rehearse and len(first) == count:
            engine.cancel(requests)
    seconds = time.perf_counter() - start
    prefill = max(first.values()) if len(first) == count else None
    row: Row = {
        "finished": not engine.has_work,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "seconds_until_all_have_a_token": prefill,
        "prompt_tokens_per_second_until_then": prefill and count * context / prefill,
        "preemptions": sum(request.preemptions for request in requests),
    }
    return row, steps[count:] or steps


def _by_formula(run: Run, config: ModelConfig, steps: list[float]) -> Row:
    """What `clsa bench paper` would say of these first and last steps and the prefill of one prompt."""
    context, count, wanted = run.args.context, run.args.requests, run.args.answer
    edge = max(1, min(200, len(steps) // 3))
    first, last = (float(np.median(part)) for part in (steps[:edge], steps[-edge:]))
    rate = prefill_row(run.bench, PLAN, config, run.params, context, context).get("tokens_per_second")
    expected = end_to_end(count, context, wanted, rate, first, last)
    times = {"first_step_ms": 1e3 * first, "last_step_ms": 1e3 * last, "steps_timed": len(steps)}
    return times | {"prefill_tokens_per_second_alone": rate, "by_the_formula_of_paper": expected}


def plans(run: Run) -> Row:
    """Decode steps of all plans at the context and number of requests."""
    run.params = {}  # every plan makes its own
    report = bench_decode(run.bench)
    return {"rows": report.rows, "wrong": report.wrong, **run.bench.ceiling_facts()}


PARTS: dict[str, Callable[[Run], Row]] = {"answer": answer, "million": million, "serve": serve, "plans": plans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--sizes", default="4b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=30_000, help="of the long answer")
    parser.add_argument("--million", type=int, default=1_000_000, help="tokens of the long context")
    parser.add_argument("--million-steps", type=int, default=400)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--answer", type=int, default=10_000, help="tokens of each of many answers")
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=140.0, help="at most for a loop of steps")
    parser.add_argument("--figure-seconds", type=float, default=1.0)
    args = parser.parse_args()
    chosen = args.parts.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"--parts must be among {', '.join(PARTS)}, got {unknown}")
    run = Run(args)
    result: Row = provenance() | {"machine": machine(run.ops), "dtype": run.dtype, "sizes": args.sizes}
    for part in sorted(chosen, key=list(PARTS).index):
        begin = time.perf_counter()
        found = PARTS[part](run)
        result[part] = found | {"part_seconds": time.perf_counter() - begin}
        print(json.dumps({part: result[part]}, indent=1), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
