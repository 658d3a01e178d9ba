"""`LLM.run`: any number of requests, read only as far as there is room; and what the keywords of a request do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import clsa
from clsa.config import SamplingParams
from clsa.errors import RequestError
from clsa.llm import LLM
from clsa.outputs import RequestOutput
from tests.engine import models
from tests.engine.models import assert_all_returned, mixed_requests

SEQS = 4
Job = tuple[int, list[int], SamplingParams]


@pytest.fixture
def llm() -> LLM:
    return models.load(max_num_seqs=SEQS)


class Source:
    """Requests of mixed lengths; counts how many were read and not answered yet."""

    def __init__(self, count: int) -> None:
        self.requests = mixed_requests(count)
        self.read = self.most = self.answered = 0

    def __iter__(self) -> Iterator[Job]:
        for i, (prompt, params) in enumerate(self.requests):
            self.read += 1
            self.most = max(self.most, self.read - self.answered)
            yield i, prompt, params


def outputs(llm: LLM, source: Source, *, ordered: bool) -> dict[int, RequestOutput]:
    found = {}
    for key, output in llm.run(source, ordered=ordered):
        source.answered += 1
        assert isinstance(output, RequestOutput)
        found[key] = output
    assert_all_returned(llm.stats())
    assert not llm._shared._mail
    return found


@pytest.mark.parametrize("ordered", [False, True])
def test_answers_are_those_of_generate(llm: LLM, ordered: bool) -> None:
    source = Source(40)
    found = outputs(llm, source, ordered=ordered)
    assert (list(found) == sorted(found)) == ordered, "as they finish, unless an order was asked for"
    assert source.most <= (4 if ordered else 2) * SEQS, "it reads ahead only as far as there is room"
    wanted = llm.generate([prompt for prompt, _ in source.requests], [params for _, params in source.requests])
    assert [found[i].token_ids for i in range(40)] == [output.token_ids for output in wanted]


def test_a_slow_request_holds_back_only_a_window_of_others(llm: LLM) -> None:
    many, one = SamplingParams(max_tokens=200, ignore_eos=True), SamplingParams(max_tokens=1)
    read = 0

    def requests() -> Iterator[Job]:
        nonlocal read
        for i in range(100):
            read += 1
            yield i, [5 + i], many if i == 0 else one

    results = llm.run(requests(), ordered=True)
    assert next(results)[0] == 0
    assert read == 4 * SEQS
    assert [key for key, _ in results] == list(range(1, 100))


def test_what_is_refused_keeps_its_place(llm: LLM) -> None:
    how = SamplingParams(max_tokens=2)
    refused = RequestError("the caller knew")
    requests = [("a", "x", how), ("b", "", how), ("c", [1] * 2000, how), ("d", refused, how), ("e", "x", None)]
    results = list(llm.run(requests, ordered=True))  # type: ignore[arg-type]
    assert [key for key, _ in results] == ["a", "b", "c", "d", "e"]
    texts = [str(result) if isinstance(result, RequestError) else "" for _, result in results]
    assert texts[0] == texts[4] == "" and "empty" in texts[1] and "max_model_len" in texts[2]
    assert results[3][1] is refused
    assert list(llm.run([])) == []


def test_closing_cancels_and_errors_of_the_source_come_through(llm: LLM) -> None:
    results = llm.run((i, [5 + i], SamplingParams(max_tokens=300, ignore_eos=True)) for i in range(100))
    next(results)
    results.close()
    assert_all_returned(llm.stats())
    assert not llm._shared._mail

    def broken() -> Iterator[Job]:
        yield 0, [5], SamplingParams()
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        list(llm.run(broken()))
    assert_all_returned(llm.stats())
    assert not llm._shared._mail


def test_runs_and_streams_take_turns(llm: LLM) -> None:
    def tokens(key: int, output: RequestOutput | RequestError) -> tuple[int, list[int]]:
        assert isinstance(output, RequestOutput)
        return key, output.token_ids

    def start() -> Iterator[tuple[int, RequestOutput | RequestError]]:
        return llm.run((i, [5 + i], SamplingParams(max_tokens=9)) for i in range(12))

    alone = dict(tokens(*result) for result in start())
    pieces = llm.stream([3, 4], SamplingParams(max_tokens=9, ignore_eos=True))
    first: dict[int, list[int]] = {}
    second: dict[int, list[int]] = {}
    texts = []
    for one, other, piece in zip(start(), start(), pieces):
        first.update([tokens(*one)])
        second.update([tokens(*other)])
        texts.append(piece.text)
    assert len(texts) == 9 and len(alone) == 12
    assert first.items() <= alone.items() and second.items() <= alone.items()
    assert len(first) >= 9 <= len(second)


def test_more_than_may_wait() -> None:
    llm = models.load(max_num_seqs=1, max_waiting=1)
    results = list(llm.run((i, [5 + i], SamplingParams(max_tokens=2)) for i in range(20)))
    assert sorted(key for key, _ in results) == list(range(20))


def test_salts_share_no_prefix(llm: LLM) -> None:
    prompt, how = [7] * 200, SamplingParams(max_tokens=1)
    cached = [llm.generate(prompt, how, salt=salt)[0].cached_tokens for salt in ("", "a", "", "a", "b")]
    assert cached == [0, 0, 192, 192, 0]
    assert [output.cached_tokens for _, output in llm.run([(0, prompt, how)], salt="a")] == [192]  # type: ignore[union-attr]
    assert next(iter(llm.stream(prompt, how, salt="c"))).cached_tokens == 0
    for salt in (None, 7, "x" * 1025):
        with pytest.raises(RequestError, match="salt must be a text of at most 1024 characters"):
            llm.generate(prompt, how, salt=salt)  # type: ignore[arg-type]


def test_priority_and_timeout(llm: LLM) -> None:
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    assert [output.finish_reason for output in llm.generate(["a", "b"], long, timeout=0)] == ["deadline"] * 2
    assert [piece.finish_reason for piece in llm.stream("a", long, timeout=0.0)] == ["deadline"]
    assert llm.generate("a", SamplingParams(max_tokens=1, ignore_eos=True), timeout=60)[0].finish_reason == "length"
    for timeout in (-1, float("nan"), "1"):
        with pytest.raises(RequestError, match="timeout"):
            llm.generate("a", long, timeout=timeout)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="priority"):
        llm.generate("a", long, priority=1 << 40)
    urgent = llm._request([3], long, -1, "", None)
    assert (urgent.priority, urgent.deadline) == (-1, None)


def test_pieces_have_the_best_tokens_when_asked(llm: LLM) -> None:
    how = SamplingParams(max_tokens=5, logprobs=3, ignore_eos=True)
    wanted = llm.generate("def", how)[0].logprobs
    assert wanted is not None
    assert [piece.top for piece in llm.stream("def", how)] == [item.top for item in wanted]
    assert all(len(item.top) == 3 for item in wanted)
    assert [piece.top for piece in llm.stream("def", clsa.SamplingParams(max_tokens=2))] == [(), ()]
