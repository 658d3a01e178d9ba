"""The engine when something goes wrong: whoever has nothing to do with it is not harmed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import clsa.engine
from tests.engine import models
from tests.engine.asking import BAD, GREEDY, answers, prompts
from tests.engine.models import CONFIG, Failing, assert_all_returned, finish, on_backends, open_ops, run


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
