"""Decode steps and prefill, through the engine that users get."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from clsa.batch import SequenceChunk, build_batch
from clsa.bench.bench import Bench, Params
from clsa.bench.checks import wrong_decode, wrong_prefill
from clsa.bench.engine import (
    checked_step,
    decoding_engine,
    filled_state,
    fitting_pages,
    make_engine,
    random_prompts,
)
from clsa.bench.floors import decode_bytes, prefill_flops
from clsa.bench.peers import Peer
from clsa.bench.random_arrays import wait
from clsa.bench.report import Row
from clsa.bench.timing import Times, time_blocking
from clsa.config import PAGE_SIZE, ModelConfig, SamplingParams
from clsa.errors import ClsaError
from clsa.model import forward
from clsa.ops import State
from clsa.plan import make_plan
from clsa.residency import num_pages

STEP_ROOM = 256  # tokens that a sequence may grow by while its steps are timed
WHOLE_SECONDS = 15.0  # of prefill that are measured; a longer one is estimated
_SAMPLED_STEPS = 3  # a prompt of fewer steps is always measured
_WARM_UP = 6  # steps until shapes are compiled, graphs recorded, and one step is under way
_REHEARSALS, _LONG_PROMPT = 3, 1.0  # until what is recorded of a prompt's steps is; one in prompts that take seconds


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """One step of the engine, the model alone in it and `answer` tokens later, and what was not as in real life."""

    step: Times
    forward: Times
    later: Times | None
    note: str


def time_decode(
    bench: Bench, config: ModelConfig, params: Params, context: int, batch: int, answer: int = 0
) -> DecodeTimes:
    """Time decode steps of `batch` sequences of `context` tokens, whose state is random.

    First `model.forward` alone, on one step again and again; then steps of the engine, which schedules, samples,
    reads back and makes text. Where the state does not fit, sequences share pages and the note says so.
    """
    ops, plan = bench.ops, make_plan(config)
    each = num_pages(config.max_position_embeddings)
    pages = fitting_pages(ops, config, bench.dtype, batch * each, batch, bench.stored)
    note = "" if pages >= batch * each else f"sequences share pages: {pages:,} of {batch * each:,} fit"
    states: list[State] = [filled_state(ops, config, bench.dtype, pages, batch, bench.stored)]
    order = np.random.default_rng(4).permutation(pages)
    tables = [order[(np.arange(each) + b * each) % pages].tolist() for b in range(batch)]

    def alone(at: int) -> Times:
        chunks = [SequenceChunk([b % 100], at, tables[b], b, "last") for b in range(batch)]
        step = build_batch(ops, chunks, config.sliding_window)

        def run(_: int) -> Any:
            logits, states[0] = forward(ops, params, plan, step, states[0])
            ops.evaluate(logits, states[0])
            return logits

        return bench.stopwatch.time(run)

    later = alone(context + answer) if answer else None
    times = alone(context)
    engine = decoding_engine(ops, params, config, bench.dtype, states.pop(), pages, [context] * batch)
    for _ in range(_WARM_UP):
        checked_step(engine)

    def one_step() -> None:
        if len(checked_step(engine)) != batch:
            raise ClsaError(f"a step did not bring one token to each of {batch} sequences")

    return DecodeTimes(time_blocking(one_step, bench.settings.seconds), times, later, note)


def decode_row(
    bench: Bench, name: str, config: ModelConfig, params: Params, context: int, batch: int, answer: int = 0
) -> Row:
    """Check and time decode steps, beside the bytes they must move and the time that takes at least.

    With `answer`, also what a step takes so many tokens later: longer by what the model alone takes longer. The
    config must have room for that. A plan that is wrong gets a row without times.
    """
    row: Row = {"plan": name, "context": context, "batch": batch, "step_seconds": None, "tokens_per_second": None}
    if wrong := wrong_decode(bench, name, config, context, batch):
        return row | {"wrong": wrong, "note": f"WRONG, not timed: {wrong}"}
    bench.note(f"decode: {name}, {context:,} tokens, batch {batch}")
    times = time_decode(bench, config, params, context, batch, answer)
    needed = decode_bytes(config, context, batch, bench.itemsize, bench.stored, bench.weight_dtype)
    floor = needed.total / bench.ceilings.read
    row |= {
        "step_seconds": times.step.median,
        "step_spread": times.step.spread,
        "steps": len(times.step.samples),
        "tokens_per_second": batch / times.step.median,
        "forward_seconds": times.forward.median,
        "forward_clock": times.forward.clock,
        "floor_bytes": needed.total,
        "floor_seconds": floor,
        "floor_share": floor / times.step.median,
        "note": times.note,
    }
    if times.later is not None:
        row["end_step_seconds"] = times.step.median + times.later.median - times.forward.median
    return row


def peer_decode_row(bench: Bench, peer: Peer, context: int, batch: int) -> Row:
    """The same of somebody else's dense model; without a time if it does not fit."""
    bench.note(f"decode: {peer.name}, {context:,} tokens, batch {batch}")
    row: Row = {"plan": peer.name, "context": context, "batch": batch}
    try:
        run = peer.decode(context, batch)
    except MemoryError as error:
        return row | {"step_seconds": None, "note": str(error)}
    times = time_blocking(run, bench.settings.seconds)
    return row | {
        "step_seconds": times.median,
        "step_spread": times.spread,
        "steps": len(times.samples),
        "tokens_per_second": batch / times.median,
        "note": "",
    }


def prefill_row(bench: Bench, name: str, config: ModelConfig, params: Params, tokens: int, length: int) -> Row:
    """Check and time `tokens` as prompts of `length` each, packed as the scheduler does it, up to one new token each.

    A long prompt that would take more than `WHOLE_SECONDS` is not run: its time follows from its first step, the one
    in the middle and the last, whose state is random (Simpson's rule), and the note says so.
    """
    count, step = max(1, tokens // length), bench.settings.tokens_per_step
    row: Row = {"plan": name, "prompts": count, "prompt_tokens": length, "tokens": count * length, "seconds": None}
    if wrong := wrong_prefill(bench, name, config, length):
        return row | {"wrong": wrong, "note": f"WRONG, not timed: {wrong}"}
    bench.note(f"prefill: {name}, {count} x {length:,} tokens")
    wanted = count * num_pages(length + 1)
    pages = fitting_pages(bench.ops, config, bench.dtype, wanted, min(count, step), bench.stored)
    if pages < num_pages(length + 1):
        return row | {"note": f"a prompt needs {num_pages(length + 1):,} pages, {pages:,} fit"}
    estimate = _estimate(bench, config, params, length) if length >= _SAMPLED_STEPS * step else 0.0
    if count * estimate > WHOLE_SECONDS:
        note = "not run whole: estimated from its first, middle and last step"
        return row | _prefill_rate(bench, config, count, length, count * estimate) | {"note": note}
    times = _time_prompts(bench, config, params, count, length, pages)
    spread = {"spread": times.spread, "runs": len(times.samples)}
    return row | _prefill_rate(bench, config, count, length, times.median) | spread | {"note": ""}


def _prefill_rate(bench: Bench, config: ModelConfig, count: int, length: int, seconds: float) -> Row:
    floor = count * prefill_flops(config, length) / bench.ceilings.matmul
    rate = count * length / seconds
    return {"seconds": seconds, "tokens_per_second": rate, "floor_seconds": floor, "floor_share": floor / seconds}


def _estimate(bench: Bench, config: ModelConfig, params: Params, length: int) -> float:
    """Seconds of a whole prompt, from three of its steps."""
    ops, plan, step = bench.ops, make_plan(config), bench.settings.tokens_per_step
    pages = num_pages(length)
    state = filled_state(ops, config, bench.dtype, pages, 1, bench.stored)
    (prompt,) = random_prompts(1, step)

    def seconds(start: int) -> float:
        nonlocal state
        chunk = SequenceChunk(prompt, start, range(pages), 0, "none")
        batch = build_batch(ops, [chunk], config.sliding_window)
        wait(ops, state)
        begin = time.perf_counter()
        state = forward(ops, params, plan, batch, state)[1]
        wait(ops, state)
        return time.perf_counter() - begin

    starts = (0, (length - step) // 2, length - step)
    first, middle, last = (min(seconds(start) for _ in range(2)) for start in starts)  # one of the two compiles
    return (first + 4 * middle + last) / 6 * length / step


def _time_prompts(bench: Bench, config: ModelConfig, params: Params, count: int, length: int, pages: int) -> Times:
    step = bench.settings.tokens_per_step
    engine = make_engine(
        bench.ops,
        params,
        config,
        bench.dtype,
        pages=pages,
        slots=min(count, step),
        tokens_per_step=step,
        stored=bench.stored,
    )
    seeds = iter(range(1 << 30))

    def run(prompts: list[list[int]]) -> float:
        requests = [engine.make_request(prompt, SamplingParams(max_tokens=1)) for prompt in prompts]
        start = time.perf_counter()
        for request in requests:
            engine.add(request)
        while engine.has_work:
            checked_step(engine)
        return time.perf_counter() - start

    # Before, as long as those that count: kernels are compiled, and steps recorded, for lengths of contexts too.
    for _ in range(_REHEARSALS):
        if run(random_prompts(min(count, -(-step // length)), length, next(seeds))) > _LONG_PROMPT:
            break
    samples = [run(random_prompts(count, length, next(seeds)))]
    while sum(samples) < bench.settings.seconds and len(samples) < 20:
        samples.append(run(random_prompts(count, length, next(seeds))))
    return Times(tuple(samples), "host clock, all prompts")


def peer_prefill_row(bench: Bench, peer: Peer, tokens: int, length: int) -> Row:
    """The same of somebody else's dense model."""
    count = max(1, tokens // length)
    bench.note(f"prefill: {peer.name}, {count} x {length:,} tokens")
    row: Row = {"plan": peer.name, "prompts": count, "prompt_tokens": length, "tokens": count * length}
    try:
        run = peer.prefill(length, count)
    except MemoryError as error:
        return row | {"seconds": None, "note": str(error)}
    times = time_blocking(run, 0.0, warm_up=0)  # whole prompts are long enough not to need more
    per_second = count * length / times.median
    return row | {"seconds": times.median, "spread": times.spread, "tokens_per_second": per_second, "note": ""}


def page_room(context: int, answer: int = 0) -> int:
    """The longest sequence while steps at `context`, and `answer` tokens later, are timed, in whole pages."""
    return num_pages(context + answer + STEP_ROOM) * PAGE_SIZE
