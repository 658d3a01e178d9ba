"""What tests of the scheduler share: one of small sizes, requests, and steps of it that give a token each."""

from __future__ import annotations

from typing import Any

from clsa.config import SamplingParams
from clsa.request import Request
from clsa.scheduler import Scheduler
from clsa.step_plan import StepPlan

TOKEN = 7
Shape = list[tuple[str, int, int]]


def make(**sizes: Any) -> Scheduler:
    defaults: dict[str, Any] = {
        "num_pages": 64,
        "num_slots": 8,
        "num_snapshots": 16,
        "max_tokens_per_step": 256,
        "max_model_len": 2048,
        "window": 32,
        "max_waiting": 100,
        "eos_token_ids": (0,),
    }
    return Scheduler(**(defaults | sizes))


def request(name: str, prompt: int | list[int] = 8, max_tokens: int = 16, **options: Any) -> Request:
    params = {key: options.pop(key) for key in ("stop_token_ids", "ignore_eos") if key in options}
    tokens = [1] * prompt if isinstance(prompt, int) else prompt
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens, **params), **options)


def distinct(first: int, length: int) -> list[int]:
    return [first, *[1] * (length - 1)]


def add(scheduler: Scheduler, *requests: Request) -> tuple[Request, ...]:
    for one in requests:
        scheduler.add(one)
    return requests


def shape(plan: StepPlan | None) -> Shape:
    return [] if plan is None else [(chunk.request.id, chunk.start, chunk.stop) for chunk in plan.chunks]


def must(plan: StepPlan | None) -> StepPlan:
    assert plan is not None
    return plan


def complete(scheduler: Scheduler, plan: StepPlan, token: int = TOKEN) -> list[Request]:
    return scheduler.complete(plan, [token] * sum(chunk.wants_logits for chunk in plan.chunks))


def step(scheduler: Scheduler, token: int = TOKEN) -> Shape:
    plan = scheduler.schedule()
    if plan is not None:
        complete(scheduler, plan, token)
    return shape(plan)


def drain(scheduler: Scheduler, token: int = TOKEN) -> int:
    for steps in range(10_000):
        if not scheduler.has_work:
            return steps
        assert step(scheduler, token)
    raise AssertionError("it never ends")
