"""Conversations: what is computed again, what is kept, and which messages are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import pytest

from clsa import RequestError, SamplingParams
from clsa.llm import LLM
from clsa.outputs import Piece, RequestOutput
from tests.engine import models
from tests.engine.models import assert_all_returned, on_backends

SHORT = SamplingParams(max_tokens=16, ignore_eos=True)


def conversation(llm: LLM, params: SamplingParams, *, stream: bool) -> list[tuple[list[int], str, int]]:
    """Three turns: ids of the prompt, answer, tokens of the prompt that came from the cache."""
    messages: list[dict[str, str]] = []
    turns = []
    for question in ("Tell me about lines and points, and why " * 3, " and then? ", "äh " * 30):
        messages.append({"role": "user", "content": question})
        made = llm.chat(messages, params, stream=stream)
        if isinstance(made, RequestOutput):
            text, cached = made.text, made.cached_tokens
        else:
            pieces = list(made)
            text, cached = "".join(piece.text for piece in pieces), pieces[0].cached_tokens
        messages.append({"role": "assistant", "content": text})
        turns.append((llm._turn.prompt, text, cached))
    return turns


@on_backends
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "params",
    [replace(SHORT, max_tokens=60), SamplingParams(max_tokens=60, temperature=1.0, seed=3)],
    ids=["greedy", "seeded"],
)
def test_chat_computes_only_what_is_new(backend: str, stream: bool, params: SamplingParams) -> None:
    llm = models.load(backend)
    turns = conversation(llm, params, stream=stream)
    assert turns[0][2] == 0
    for (before, _, _), (prompt, answer, cached) in pairwise(turns):
        assert prompt[: len(before)] == before, "what the last turn had is not tokenised anew"
        assert cached % 64 == 0 and cached >= len(before) // 64 * 64 - 64 and cached > 0
        # A fresh engine, given the same ids, says the same.
        assert models.load(backend, prefix_cache_bytes=0).generate(prompt, params)[0].text == answer
    computed = llm.stats()["prompt_tokens"] - llm.stats()["prefix_tokens_hit"]
    assert computed < len(turns[-1][0])


def test_an_answer_is_kept_as_it_was_generated(llm: LLM) -> None:
    question = [{"role": "user", "content": "x = "}]
    output = llm.chat(question, SHORT)
    assert isinstance(output, RequestOutput)
    first = llm._turn.prompt
    assert first == [0, *llm.tokenizer.encode("x = ", add_special_tokens=False)]
    following = [*question, {"role": "assistant", "content": output.text}, {"role": "user", "content": " why"}]
    llm.chat(following, SHORT)
    assert llm._turn.prompt == [*first, *output.token_ids, *llm.tokenizer.encode(" why", add_special_tokens=False)]
    kept = llm._turn.prompt
    llm.chat(following, SHORT)
    assert llm._turn.prompt == kept, "asking again is the same question"
    llm.chat([{"role": "user", "content": "another"}], SHORT)
    assert llm._turn.prompt == [0, *llm.tokenizer.encode("another", add_special_tokens=False)]


def ended_by_stop_string(llm: LLM, question: list[dict[str, str]]) -> str:
    text = cast(RequestOutput, llm.chat(question, SHORT)).text
    return cast(RequestOutput, llm.chat(question, replace(SHORT, stop=(text[5:8],)))).text


def stopped_by_the_reader(llm: LLM, question: list[dict[str, str]]) -> str:
    text = cast(RequestOutput, llm.chat(question, SHORT)).text
    stream = llm.chat(question, replace(SHORT, stop=(text[5:] + "held back",)), stream=True)
    with contextlib.closing(cast("Generator[Piece, None, None]", stream)) as pieces:
        return "".join(next(pieces).text for _ in range(10))


@pytest.mark.parametrize("ending", [ended_by_stop_string, stopped_by_the_reader])
def test_text_that_was_not_shown_is_not_in_the_next_prompt(llm: LLM, ending: Callable[..., str]) -> None:
    question = [{"role": "user", "content": "x = "}]
    text = ending(llm, question)
    assert len(text) >= 5
    llm.chat([*question, {"role": "assistant", "content": text}, {"role": "user", "content": " why"}], SHORT)
    assert llm.tokenizer.decode(llm._turn.prompt) == f"x = {text} why"
    assert_all_returned(llm.stats())


def test_an_answer_that_ends_with_eos_is_kept_without_it() -> None:
    llm = models.load()
    question = [{"role": "user", "content": "x = "}]
    tokens = cast(RequestOutput, llm.chat(question, SHORT)).token_ids
    output = cast(RequestOutput, llm.chat(question, replace(SHORT, stop_token_ids=(tokens[5],))))
    assert output.token_ids == tokens[:6]
    llm.chat([*question, {"role": "assistant", "content": output.text}, {"role": "user", "content": " why"}], SHORT)
    assert llm._turn.prompt[4:9] == tokens[:5] or tokens[0:5] == llm._turn.prompt[-5 - len(" why") : -len(" why")]
    assert llm.tokenizer.decode(llm._turn.prompt) == f"x = {output.text} why"


@pytest.mark.parametrize("messages", [[], "hi", [{"role": "user"}], [{"role": "user", "content": 5}], None])
def test_bad_messages(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError):
        llm.chat(messages, SHORT)
    with pytest.raises(RequestError):
        llm.chat([{"role": "user", "content": "x " * 2000}], SHORT, stream=True)
    assert llm.stats()["steps"] == 0


def test_chat_gives_logprobs_when_asked(llm: LLM) -> None:
    output = llm.chat([{"role": "user", "content": "x"}], replace(SHORT, logprobs=1))
    assert isinstance(output, RequestOutput) and output.logprobs is not None and len(output.logprobs) == 16
    assert cast(RequestOutput, llm.chat([{"role": "user", "content": "x"}], SHORT)).logprobs is None
