"""The engine when something goes wrong or is called off: whoever has nothing to do with it is not harmed."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import clsa.engine
from clsa.config import SamplingParams
from clsa.engine import Engine
from clsa.errors import ClsaError, RequestError
from clsa.outputs import RequestOutput
from clsa.request import Request
from tests.engine import models
from tests.engine.models import CONFIG, Failing, assert_all_returned, finish, on_backends, open_ops, run

BAD = 50  # the token whose embedding is broken
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def prompts(count: int, length: int = 40, seed: int = 0) -> list[list[int]]:
    """Random prompts without BAD."""
    rng = random.Random(seed)
    return [[rng.choice([t for t in range(320) if t != BAD]) for _ in range(length)] for _ in range(count)]


def answers(engine: Engine, tokens: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    requests = [engine.make_request(prompt, params) for prompt in tokens]
    outputs = run(engine, requests)
    assert all(outputs[request].error is None for request in requests)
    return [outputs[request].token_ids for request in requests]


def broken(value: float) -> dict[str, np.ndarray]:
    weights = models.params(CONFIG)
    weights["model.embed_tokens.weight"][BAD] = value
    return weights


# -- logits that are not finite ---------------------------------------------------------------------------------


@on_backends
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("length", [1, 100, 300])
def test_logits_that_are_not_finite_end_that_request_only(backend: str, value: float, length: int) -> None:
    good = prompts(9, 70)
    wanted = answers(models.engine(open_ops("numpy")), good)
    assert not any(BAD in tokens for tokens in wanted)
    engine = models.engine(open_ops(backend), broken(value), max_tokens_per_step=64)
    bad = prompts(1, length, seed=1)[0]
    place = max(0, length - 3)  # in the window of the last token; far back, the index never selects it
    bad[place] = BAD
    requests = [engine.make_request(prompt, GREEDY) for prompt in [*good[:3], bad, *good[3:]]]
    outputs = list(run(engine, requests).values())
    failed = outputs.pop(3)
    assert (failed.finish_reason, failed.text, failed.token_ids) == ("error", "", [])
    assert failed.error == "the model's logits are not finite"
    assert [output.token_ids for output in outputs] == wanted
    # Whoever comes next gets its pages and its window slot.
    assert answers(engine, good) == wanted
    # Nor did it leave anything to those who begin as it did.
    shared = [*bad[:place], *prompts(1, 70, seed=2)[0]]
    assert answers(engine, [shared]) == answers(models.engine(open_ops("numpy")), [shared])


@on_backends
def test_state_that_is_not_finite_stays_with_its_request(backend: str) -> None:
    """A broken token far back need not reach the logits; its rows of memory and window are used again by others."""
    good = prompts(9, 70)
    wanted = answers(models.engine(open_ops("numpy")), good)
    engine = models.engine(open_ops(backend), broken(np.nan), max_tokens_in_memory=512, prefix_cache_bytes=0)
    for seed in range(3):
        bad = prompts(4, 90, seed=seed)
        for prompt in bad:
            prompt[20:50] = [BAD] * 30
        run(engine, [engine.make_request(prompt, GREEDY) for prompt in bad])
        assert answers(engine, good) == wanted


@on_backends
def test_logits_that_are_not_finite_in_the_middle_of_an_answer(backend: str) -> None:
    [prompt] = prompts(1)
    weights = models.params(CONFIG)
    [tokens] = answers(models.engine(open_ops("numpy")), [prompt])
    weights["model.embed_tokens.weight"][tokens[4]] = np.nan
    assert tokens[4] not in [*tokens[:4], *prompt]
    engine = models.engine(open_ops(backend), weights)
    request = engine.make_request(prompt, replace(GREEDY, logprobs=2))
    output = run(engine, [request])[request]
    assert (output.token_ids, output.finish_reason) == (tokens[:5], "error")
    assert output.logprobs is not None and len(output.logprobs) == 5


# -- steps that fail --------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("function", ["embed", "gather_attention", "sample", "fetch"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_step_that_fails_ends_what_ran(backend: str, function: str, n: int) -> None:
    tokens = prompts(8)
    wanted = answers(models.engine(open_ops("numpy")), tokens)
    ops: Any = Failing(open_ops(backend))
    engine = models.engine(ops)
    ops.fail(function, n, RuntimeError("out of memory\nat 0x7"))
    requests = [engine.make_request(prompt, GREEDY) for prompt in tokens]
    outputs = list(run(engine, requests).values())
    assert ops.has_failed
    failed = [output for output in outputs if output.error]
    assert 0 < len(failed) <= 4, "four run at a time; the others wait and go on"
    for output, want in zip(outputs, wanted):
        if output.error is None:
            assert (output.token_ids, output.finish_reason) == (want, "length")
        else:
            assert (output.error, output.finish_reason) == (
                "the step failed: RuntimeError: out of memory at 0x7",
                "error",
            )
            assert output.token_ids == want[: len(output.token_ids)]
    assert answers(engine, tokens) == wanted


def test_after_a_failed_step_the_state_is_new() -> None:
    """On a lazy backend the old one may be the outcome of what failed, and would fail again."""
    ops: Any = Failing(open_ops("numpy"))
    engine = models.engine(ops)
    answers(engine, prompts(1))
    for function in ("embed", "new_memory"):
        ops.fail(function, 1, RuntimeError(f"in {function}"))
        request = engine.make_request(prompts(1)[0], GREEDY)
        assert run(engine, [request])[request].error == f"the step failed: RuntimeError: in {function}"
    assert answers(engine, prompts(1)) == answers(models.engine(open_ops("numpy")), prompts(1))


def test_a_failed_step_does_not_take_back_what_the_step_before_brought() -> None:
    [tokens] = answers(models.engine(open_ops("numpy")), prompts(1))
    ops: Any = Failing(open_ops("numpy"))
    engine = models.engine(ops)
    ops.fail("sample", 4, RuntimeError("no"))
    request = engine.make_request(prompts(1)[0], GREEDY)
    output = run(engine, [request])[request]
    assert (output.token_ids, output.finish_reason) == (tokens[:3], "error")
    # A request whose last token was sampled before has its answer.
    ops.fail("sample", 4, RuntimeError("no"))
    both = [engine.make_request(prompts(1)[0], replace(GREEDY, max_tokens=n)) for n in (3, 12)]
    assert [(len(o.token_ids), o.finish_reason) for o in run(engine, both).values()] == [(3, "length"), (3, "error")]


@on_backends
def test_a_device_that_is_dead_ends_every_request_and_the_loop(backend: str) -> None:
    ops: Any = Failing(open_ops(backend))
    engine = models.engine(ops)
    ops.fail("embed", 3, RuntimeError("device lost"), for_ever=True)
    requests = [engine.make_request(prompt, GREEDY) for prompt in prompts(10)]
    outputs = run(engine, requests)
    assert {output.finish_reason for output in outputs.values()} == {"error"}
    ops.mend()
    assert answers(engine, prompts(2)) == answers(models.engine(open_ops("numpy")), prompts(2))


# -- interruptions ----------------------------------------------------------------------------------------------


@contextmanager
def interrupted_at(n: int) -> Iterator[list[int]]:
    """Ctrl-C before the n-th line that runs in the modules below the LLM. Yields the count of lines."""
    folder = Path(clsa.engine.__file__).parent
    names = ("engine", "scheduler", "residency", "prefix", "pages", "request", "runner", "batch", "sampling", "model")
    files = {str(folder / f"{name}.py") for name in names}
    lines = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] == n:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def test_ctrl_c_anywhere_leaves_the_model_usable() -> None:
    tokens, params = prompts(3, 70), replace(GREEDY, max_tokens=3)
    llm = models.load(max_num_seqs=2)
    wanted = [output.token_ids for output in llm.generate(tokens, params)]
    with interrupted_at(-1) as lines:
        llm.generate(tokens, params)
    for n in [*range(1, 60, 7), *range(60, lines[0], lines[0] // 120)]:
        with pytest.raises(KeyboardInterrupt), interrupted_at(n):
            llm.generate(tokens, params)
        outputs = llm.generate(tokens, params)
        assert [(output.token_ids, output.error) for output in outputs] == [(want, None) for want in wanted], (
            f"line {n}"
        )
        assert_all_returned(llm.stats())


@on_backends
@pytest.mark.parametrize("function", ["norm_linears", "sample", "fetch"])
def test_ctrl_c_on_a_device(backend: str, function: str) -> None:
    ops: Any = Failing(open_ops(backend))
    engine = models.engine(ops)
    wanted = answers(engine, prompts(6))
    ops.fail(function, 5, KeyboardInterrupt())
    requests = [engine.make_request(prompt, GREEDY) for prompt in prompts(6)]
    with pytest.raises(KeyboardInterrupt):
        run(engine, requests)
    outputs = list(finish(engine, requests).values())
    assert {output.error for output in outputs} == {"the engine was interrupted in the middle of a step"}
    assert answers(engine, prompts(6)) == wanted


# -- called off, late, in a hurry -------------------------------------------------------------------------------


def test_cancel_in_every_state() -> None:
    tokens = prompts(7, 100)
    engine = models.engine(open_ops("numpy"), max_tokens_per_step=48)
    wanted = answers(engine, tokens)
    for steps in range(25):
        requests = [engine.make_request(prompt, GREEDY) for prompt in tokens]
        for request in requests:
            engine.add(request)
        deltas = [delta for _ in range(steps) for delta in engine.step()]
        engine.cancel(requests[::2])
        engine.cancel(requests[::2])  # again does nothing
        assert not any(request in requests[::2] for request in finish_all(engine, deltas, requests[1::2]))
        assert [request.output_tokens for request in requests[1::2]] == wanted[1::2]


def finish_all(engine: Engine, deltas: list[Any], left: list[Request]) -> list[Request]:
    """Run to the end; who got something after the cancel."""
    before = len(deltas)
    while engine.has_work:
        deltas += engine.step()
    assert_all_returned(engine.stats())
    assert {delta.request for delta in deltas if delta.finish_reason == "length"} >= set(left)
    return [delta.request for delta in deltas[before:]]


def test_the_last_one_cancelled_gives_all_back_at_once() -> None:
    engine = models.engine(open_ops("numpy"))
    requests = [engine.make_request(prompt, GREEDY) for prompt in prompts(3)]
    for request in requests:
        engine.add(request)
    engine.step()
    engine.step()
    assert engine.stats()["running"] == 3
    engine.cancel(requests)
    assert_all_returned(engine.stats())
    assert not engine.has_work and engine.step() == []


def test_deadlines() -> None:
    engine = models.engine(open_ops("numpy"), max_num_seqs=1)
    now = time.monotonic()
    ends = (None, now - 1, now + 1000)
    requests = [engine.make_request(prompt, GREEDY, deadline=end) for prompt, end in zip(prompts(3), ends)]
    reasons = [output.finish_reason for output in run(engine, requests).values()]
    assert reasons == ["length", "deadline", "length"]
    assert requests[1].output_tokens == []


def test_a_deadline_gives_out_what_was_held_back() -> None:
    engine = models.engine(open_ops("numpy"))
    [prompt] = prompts(1)
    free = engine.make_request(prompt, GREEDY)
    text = run(engine, [free])[free].text
    stop = text[2:] + "and more"
    request = engine.make_request(
        prompt, replace(GREEDY, max_tokens=500, stop=(stop,)), deadline=time.monotonic() + 1000
    )
    engine.add(request)
    deltas = [delta for _ in range(8) for delta in engine.step()]
    assert "".join(delta.text for delta in deltas) == text[:2]
    request.deadline = 0.0
    deltas += engine.step()
    assert deltas[-1].finish_reason == "deadline" and deltas[-1].token is None
    assert len(text) > len("".join(delta.text for delta in deltas)) > 2
    assert text.startswith("".join(delta.text for delta in deltas))


def test_priority_goes_first_and_takes_pages() -> None:
    ops = open_ops("numpy")
    tokens = prompts(6, 60)
    wanted = answers(models.engine(ops), tokens, replace(GREEDY, max_tokens=30))
    engine = models.engine(ops, max_tokens_in_memory=256, max_num_seqs=3)
    params = replace(GREEDY, max_tokens=30)
    requests = [
        engine.make_request(tokens[i], params, priority=priority) for i, priority in enumerate((5, 5, 5, 1, 0, 0))
    ]
    order: list[Request] = []
    for request in requests[:3]:
        engine.add(request)
    for _ in range(3):
        assert not [delta for delta in engine.step() if delta.finish_reason]
    for request in requests[3:]:
        engine.add(request)
    while engine.has_work:
        order += [delta.request for delta in engine.step() if delta.finish_reason]
    assert [request.output_tokens for request in requests] == wanted
    assert order.index(requests[4]) < order.index(requests[2])
    assert order.index(requests[3]) < order.index(requests[2])
    assert_all_returned(engine.stats())


def test_a_full_queue_refuses_and_stays_as_it_was() -> None:
    engine = models.engine(open_ops("numpy"), max_waiting=2)
    requests = [engine.make_request(prompt, GREEDY) for prompt in prompts(3)]
    engine.add(requests[0])
    engine.add(requests[1])
    assert not engine.has_room
    with pytest.raises(RequestError, match="2 requests wait already"):
        engine.add(requests[2])
    outputs = finish(engine, requests)
    assert [output.finish_reason for output in outputs.values()] == ["length", "length", "cancelled"]
    assert run(engine, requests[2:])[requests[2]].finish_reason == "length"


# -- where an answer ends ---------------------------------------------------------------------------------------


def answer(engine: Engine, prompt: list[int], **params: Any) -> RequestOutput:
    request = engine.make_request(prompt, SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | params))
    return run(engine, [request])[request]


def test_stop_strings_are_never_in_the_text() -> None:
    engine = models.engine(open_ops("numpy"))
    [prompt] = prompts(1)
    text = answer(engine, prompt).text
    assert len(text) > 15
    for start in range(len(text)):
        for length in (1, 2, 5):
            stop = text[start : start + length]
            output = answer(engine, prompt, stop=["\0", stop])
            assert output.text == text[: text.index(stop)]
            assert output.finish_reason == "stop", "also where the last token completes it"
            assert stop in engine._tokenizer.decode(output.token_ids)
            last = answer(engine, prompt, stop=[stop], max_tokens=len(output.token_ids))
            assert (last.text, last.finish_reason) == (output.text, "stop")
    assert answer(engine, prompt, stop=[text + "x"]).text == text, "what was held back comes at the end"


def test_stop_tokens_are_in_the_ids_and_not_in_the_text() -> None:
    engine = models.engine(open_ops("numpy"))
    [prompt] = prompts(1)
    free = answer(engine, prompt)
    decode = engine._tokenizer.decode
    for i, token in enumerate(free.token_ids):
        output = answer(engine, prompt, stop_token_ids=[token])
        first = free.token_ids.index(token)
        assert output.token_ids == free.token_ids[: first + 1]
        assert (output.text, output.finish_reason) == (decode(free.token_ids[:first]), "stop"), i


def test_eos() -> None:
    [prompt] = prompts(1)
    tokens = answer(models.engine(open_ops("numpy")), prompt).token_ids
    config = replace(CONFIG, eos_token_id=(tokens[3], 1))
    engine = models.engine(open_ops("numpy"), config=config)
    output = answer(engine, prompt, ignore_eos=False)
    assert (output.token_ids, output.finish_reason) == (tokens[:4], "stop")
    assert answer(engine, prompt).token_ids == tokens
    assert answer(engine, prompt, stop_token_ids=[tokens[3]]).finish_reason == "stop"


def test_errors_are_of_this_package() -> None:
    assert issubclass(RequestError, ClsaError)
    with pytest.raises(RequestError, match="priority"):
        models.engine(open_ops("numpy")).make_request([1], GREEDY, priority=1 << 40)
