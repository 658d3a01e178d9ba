"""The engine when requests are called off, late or in a hurry, and where an answer ends."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from clsa.config import SamplingParams
from clsa.engine import Engine
from clsa.errors import ClsaError, RequestError
from clsa.outputs import RequestOutput
from clsa.request import Request
from tests.engine import models
from tests.engine.asking import GREEDY, answers, prompts
from tests.engine.models import CONFIG, assert_all_returned, finish, open_ops, run


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
