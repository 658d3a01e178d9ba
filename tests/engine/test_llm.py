"""What a user imports: generate, stream, chat, and looking inside."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Generator
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest

import clsa
import clsa.inspect_model
from clsa import ClsaError, RequestError, SamplingParams
from clsa.llm import LLM
from clsa.outputs import Piece, RequestOutput
from tests.engine import models
from tests.engine.models import CONFIG, CROSS, FULL, SLIDING, assert_all_returned, on_backends

TEXTS = ["def read(path):\n", "class Point:", "x", "漢字 😀 in a string", models.TEXT]
SHORT = SamplingParams(max_tokens=16, ignore_eos=True)


@pytest.fixture
def llm() -> LLM:
    return models.load()


def close(pieces: Any) -> None:
    cast("Generator[Piece, None, None]", pieces).close()


# -- generate ---------------------------------------------------------------------------------------------------


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [replace(SHORT, max_tokens=n) for n in (40, 1, 5, 17, 2)]
    outputs = llm.generate(TEXTS, params)
    assert [len(output.token_ids) for output in outputs] == [40, 1, 5, 17, 2]
    for text, p, output in zip(TEXTS, params, outputs):
        [single] = llm.generate(text, p)
        assert (single.text, single.token_ids) == (output.text, output.token_ids)
        assert output.prompt_tokens == len(llm.tokenizer.encode(text))
        assert output.finish_reason == "length" and output.error is None and output.logprobs is None
        assert output.text == llm.tokenizer.decode(output.token_ids)
    assert_all_returned(llm.stats())


def test_token_ids_go_wherever_text_goes(llm: LLM) -> None:
    text = TEXTS[0]
    ids = llm.tokenizer.encode(text)
    assert ids[0] == CONFIG.bos_token_id
    wanted = llm.generate(text, SHORT)[0].token_ids
    prompts: list[Any] = [ids, tuple(ids), np.array(ids), np.array(ids, np.uint16), [np.int64(i) for i in ids]]
    for prompt in prompts:
        assert [output.token_ids for output in llm.generate(prompt, SHORT)] == [wanted]
        assert [output.token_ids for output in llm.generate([text, prompt], SHORT)] == [wanted] * 2
        assert [piece.token for piece in llm.stream(prompt, SHORT)] == wanted
    both = llm.generate(np.array([ids, ids]), SHORT)
    assert [output.token_ids for output in both] == [wanted] * 2
    assert llm.generate(range(5), SHORT)[0].prompt_tokens == 5
    np.testing.assert_array_equal(llm.logits(ids), llm.logits(np.array(ids)))


def test_defaults() -> None:
    llm = models.load(max_model_len=300)
    output = llm.generate("x")[0]
    assert len(output.token_ids) == 256 or output.token_ids[-1] == CONFIG.eos_token_id
    assert llm.generate([]) == [] and llm.stats()["running"] == 0
    assert (llm.backend, llm.dtype, llm.config) == ("numpy", "float32", CONFIG)
    assert "as asked" in llm.why and "NumPy" in llm.device


BAD_PROMPTS: list[Any] = [
    "",
    [""],
    [[]],
    ["fine", ""],
    [[1, 2], []],
    [320],
    [-1],
    [[1], [1 << 70]],
    [[1.0]],
    [1.5],
    [[True]],
    [["a", "b"]],
    [None],
    None,
    5,
    b"bytes",
    [b"bytes"],
    {"prompt": 1},
    {1, 2},
    np.array(3),
    np.array([[0.5]]),
    [[[1]]],
    "\ud800",
    [0] * 1020,
    "word " * 1000,
]


@pytest.mark.parametrize("prompts", BAD_PROMPTS, ids=lambda value: repr(value)[:30])
def test_bad_prompts_are_refused_before_anything_runs(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, SHORT)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert llm.stats()["steps"] == llm.stats()["waiting"] == 0
    assert not llm._shared._mail
    single = prompts[-1] if isinstance(prompts, list) and not isinstance(prompts[0], (int, float)) else prompts
    with pytest.raises(RequestError):
        llm.stream(single, SHORT)


@pytest.mark.parametrize("params", [[], [SHORT], [SHORT] * 3, [SHORT, None], {"max_tokens": 3}, "greedy", 5])
def test_bad_params_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match=r"one per prompt \(2\)") as caught:
        llm.generate(["a", "b"], params)
    assert len(str(caught.value)) < 300
    if not isinstance(params, list):
        with pytest.raises(RequestError):
            llm.stream("a", params)
    assert llm.stats()["steps"] == 0


def test_prompts_that_are_too_long_say_the_sizes(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"needs 1025 tokens \(1009 of prompt and 16 of max_tokens\).* is 1024"):
        llm.generate([3] * 1009, SHORT)
    assert len(llm.generate([3] * 1008, SHORT)[0].token_ids) == 16
    with pytest.raises(RequestError, match="1025 tokens and the model takes at most 1024"):
        llm.logits([3] * 1025)


def test_more_prompts_than_may_wait() -> None:
    llm = models.load(max_waiting=2, max_num_seqs=3)
    prompts = [[i] for i in range(40)]
    wanted = [output.token_ids for output in models.load().generate(prompts, SHORT)]
    assert [output.token_ids for output in llm.generate(prompts, SHORT)] == wanted
    assert_all_returned(llm.stats())


# -- stream -----------------------------------------------------------------------------------------------------


@on_backends
def test_a_stream_says_what_generate_says(backend: str) -> None:
    llm = models.load(backend)
    for text in TEXTS:
        [output] = llm.generate(text, replace(SHORT, logprobs=0))
        pieces = list(llm.stream(text, SHORT))
        assert "".join(piece.text for piece in pieces) == output.text
        assert [piece.token for piece in pieces] == output.token_ids
        assert output.logprobs is not None
        assert [piece.logprob for piece in pieces] == pytest.approx(
            [item.logprob for item in output.logprobs], abs=1e-5
        )
        assert [piece.finish_reason for piece in pieces] == [None] * 15 + ["length"]
        assert [piece.generation_tokens for piece in pieces] == list(range(1, 17))
        last = pieces[-1]
        assert last.prompt_tokens == output.prompt_tokens
        assert last.prompt_tps > 0 and last.generation_tps > 0 and last.peak_memory > 1 << 20
    assert_all_returned(llm.stats())


def test_no_piece_splits_a_character(llm: LLM) -> None:
    text = "漢字 😀 äöü" * 4
    for seed in range(20):
        params = replace(SHORT, max_tokens=40, temperature=3.0, seed=seed)
        pieces = list(llm.stream(text, params))
        assert "".join(piece.text for piece in pieces) == llm.generate(text, params)[0].text
        assert "".join(piece.text for piece in pieces) == llm.tokenizer.decode([piece.token for piece in pieces])


@on_backends
@pytest.mark.parametrize("pieces", [0, 1, 2, 7])
def test_closing_a_stream_gives_everything_back(backend: str, pieces: int) -> None:
    llm = models.load(backend)
    stream = llm.stream(models.TEXT, replace(SHORT, max_tokens=300))
    for _ in range(pieces):
        next(stream)
    assert llm.stats()["running"] == (pieces > 0)
    close(stream)
    assert_all_returned(llm.stats())
    assert not llm._shared._mail
    wanted = models.load().generate(TEXTS, SHORT)
    assert [out.token_ids for out in llm.generate(TEXTS, SHORT)] == [out.token_ids for out in wanted]


def test_a_stream_that_is_forgotten_gives_everything_back(llm: LLM) -> None:
    stream = llm.stream("x", replace(SHORT, max_tokens=300))
    next(stream)
    del stream
    gc.collect()
    assert_all_returned(llm.stats())


def test_streams_and_generate_take_turns(llm: LLM) -> None:
    wanted = [output.text for output in llm.generate(TEXTS, SHORT)]
    streams = [llm.stream(text, SHORT) for text in TEXTS]
    parts = ["" for _ in TEXTS]
    for pieces in zip(*streams):
        parts = [part + piece.text for part, piece in zip(parts, pieces)]
    assert parts == wanted
    stream = llm.stream(TEXTS[0], SHORT)
    begin = next(stream).text
    assert [output.text for output in llm.generate(TEXTS, SHORT)] == wanted
    assert llm.generate([]) == []
    assert begin + "".join(piece.text for piece in stream) == wanted[0]
    assert_all_returned(llm.stats())


def test_an_open_stream_does_not_keep_generate_waiting(llm: LLM) -> None:
    stream = llm.stream("x", replace(SHORT, max_tokens=900))
    next(stream)
    llm.generate("y", SHORT)
    assert llm.stats()["running"] == 1 and llm.stats()["steps"] < 40
    close(stream)


# -- what goes wrong --------------------------------------------------------------------------------------------


def failing(llm: LLM) -> models.Failing:
    ops = models.Failing(llm._ops)
    llm._engine._runner._ops = llm._ops = cast(Any, ops)
    return ops


def test_a_failed_step_is_an_error_of_its_requests(llm: LLM) -> None:
    wanted = [output.text for output in llm.generate(TEXTS, SHORT)]
    ops = failing(llm)
    ops.fail("embed", 6, RuntimeError("out of memory"))
    outputs = llm.generate(TEXTS, SHORT)
    assert {output.error for output in outputs} == {"the step failed: RuntimeError: out of memory"}
    assert all(output.text == llm.tokenizer.decode(output.token_ids) for output in outputs)
    assert any(output.text for output in outputs)
    ops.fail("embed", 3, RuntimeError("out of memory"))
    with pytest.raises(ClsaError, match="the step failed: RuntimeError: out of memory"):
        list(llm.stream(TEXTS[0], SHORT))
    ops.fail("embed", 3, RuntimeError("out of memory"))
    output = llm.chat([{"role": "user", "content": "x"}], SHORT)
    assert isinstance(output, RequestOutput) and output.finish_reason == "error"
    assert [output.text for output in llm.generate(TEXTS, SHORT)] == wanted
    assert_all_returned(llm.stats())


def test_ctrl_c_in_generate_also_ends_an_open_stream(llm: LLM) -> None:
    wanted = [output.text for output in llm.generate(TEXTS, SHORT)]
    stream = llm.stream(TEXTS[0], SHORT)
    next(stream)
    ops = failing(llm)
    ops.fail("norm_linears", 30, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        llm.generate(TEXTS, SHORT)
    with pytest.raises(ClsaError, match="interrupted"):
        list(stream)
    assert_all_returned(llm.stats())
    assert not llm._shared._mail
    assert [output.text for output in llm.generate(TEXTS, SHORT)] == wanted


# -- chat -------------------------------------------------------------------------------------------------------


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


# -- looking inside ---------------------------------------------------------------------------------------------


@on_backends
def test_logprobs_are_those_of_the_logits(backend: str) -> None:
    llm = models.load(backend)
    ids = llm.tokenizer.encode(models.TEXT)
    for params in (SHORT, replace(SHORT, temperature=2.0, top_k=40, repetition_penalty=1.5, seed=5)):
        [output] = llm.generate([ids], replace(params, logprobs=4))
        logits = llm.logits(ids + output.token_ids).astype(np.float64)[len(ids) - 1 :]
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert output.logprobs is not None and len(output.logprobs) == 16
        for row, token, item in zip(logprobs, output.token_ids, output.logprobs):
            assert item.token == token
            assert item.logprob == pytest.approx(row[token], abs=1e-4)
            best = np.argsort(-row, kind="stable")[:4]
            assert [top for top, _ in item.top] == best.tolist()
            assert [value for _, value in item.top] == pytest.approx(row[best].tolist(), abs=1e-4)


def penalised(logits: np.ndarray, seen: list[int], penalty: float) -> int:
    """The best token after the penalty."""
    logits, rows = logits.astype(np.float64), sorted(set(seen))
    logits[rows] = np.where(logits[rows] > 0, logits[rows] / penalty, logits[rows] * penalty)
    return int(logits.argmax())


@on_backends
@pytest.mark.parametrize("penalty", [0.5, 1.5])
def test_a_penalty_counts_the_newest_token_too(backend: str, penalty: float) -> None:
    """Which the host does not know yet when the step that it counts in is launched."""
    llm = models.load(backend)
    prompts = [llm.tokenizer.encode(text) for text in TEXTS]
    outputs = llm.generate(prompts, replace(SHORT, max_tokens=40, repetition_penalty=penalty))
    would_differ = 0
    for prompt, output in zip(prompts, outputs):
        tokens = prompt + output.token_ids
        for i, row in enumerate(llm.logits(tokens[:-1])[len(prompt) - 1 :], start=len(prompt)):
            assert tokens[i] == penalised(row, tokens[:i], penalty)
            would_differ += tokens[i] != penalised(row, tokens[: i - 1], penalty)
    assert would_differ > 0


@on_backends
@pytest.mark.parametrize(
    ("layer_types", "pattern"),
    [
        ((SLIDING, SLIDING, CROSS, CROSS), "FS"),
        ((SLIDING, CROSS, CROSS, CROSS), "DFS"),
        ((FULL, FULL, FULL, FULL), "DFSF"),
        ((FULL, FULL, FULL, FULL), "DDDD"),
        ((SLIDING, CROSS, FULL, SLIDING), "FS"),
    ],
)
def test_decode_agrees_with_logits(backend: str, layer_types: tuple[str, ...], pattern: str) -> None:
    """Each greedy token is the best of `logits` at its place, for every layer plan; chunks are cut where they fall.

    No plan here computes an index in its very first layer: there, equal tokens have equal scores at all positions, and
    in float32 the rounding of a batch decides between them.
    """
    llm = models.load(
        backend, models.folder(layer_types=layer_types, index_topk_pattern=pattern), max_tokens_per_step=50
    )
    ids = llm.tokenizer.encode(models.TEXT)[:150]
    outputs = llm.generate([ids, ids[:70], ids[:1]], replace(SHORT, max_tokens=30))
    for prompt, output in zip((ids, ids[:70], ids[:1]), outputs):
        logits = llm.logits(prompt + output.token_ids[:-1])
        assert logits.dtype == np.float32 and logits.shape == (len(prompt) + 29, 320)
        assert logits[len(prompt) - 1 :].argmax(axis=1).tolist() == output.token_ids


def test_logits_of_a_longer_text_begin_the_same(llm: LLM) -> None:
    ids = (llm.tokenizer.encode(models.TEXT) * 4)[: clsa.inspect_model.CHUNK + 90]
    whole = llm.logits(ids)
    np.testing.assert_allclose(llm.logits(ids[:100]), whole[:100], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(llm.selection(ids[:100]), llm.selection(ids)[:100])


@on_backends
def test_selection(backend: str) -> None:
    llm = models.load(backend, models.folder(index_topk_pattern="FF"))
    ids = llm.tokenizer.encode(models.TEXT)[:130]
    for chosen in (llm.selection(ids), llm.selection(ids, layer=2), llm.selection(ids, layer=3)):
        assert chosen.shape == (130, 24) and chosen.dtype == np.int32
        for t, row in enumerate(chosen):
            kept = row[: min(24, t + 1)]
            assert (row[len(kept) :] == -1).all()
            assert kept[0] >= 0 and kept[-1] <= t and (np.diff(kept) > 0).all()
        assert len({tuple(row) for row in chosen[-20:]}) == 20, "each position chooses for itself"
    np.testing.assert_array_equal(llm.selection(ids), llm.selection(ids, layer=2))
    assert (llm.selection(ids, layer=3) != llm.selection(ids, layer=2)).any()
    assert llm.selection(ids[:3]).tolist() == [[0] + [-1] * 23, [0, 1] + [-1] * 22, [0, 1, 2] + [-1] * 21]


def test_selection_of_a_layer_that_has_none(llm: LLM) -> None:
    for layer in (0, 3, -1, 99, "2"):
        with pytest.raises(RequestError, match=r"layer must be one that computes an index \(\[2\]\)"):
            llm.selection([1, 2], layer=cast(int, layer))
    dense = models.load(model=models.folder(index_topk_pattern="DD"))
    with pytest.raises(RequestError, match="this model has none"):
        dense.selection([1, 2])


@pytest.mark.parametrize("ids", [[], [320], [-1], "text", None, [0.5], [True], 7])
def test_looking_inside_checks_its_ids(llm: LLM, ids: Any) -> None:
    for look in (llm.logits, llm.selection):
        with pytest.raises(RequestError):
            look(ids)


def test_what_would_not_fit_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clsa.inspect_model, "host_memory_stats", lambda: {"free": 4 * 320 * 10 - 1})
    with pytest.raises(RequestError, match="the result of 10 tokens needs 12,800 bytes and 12,799 are free"):
        llm.logits([1] * 10)
    monkeypatch.undo()
    monkeypatch.setattr(llm._ops, "memory_stats", lambda: {"free": 1000})
    with pytest.raises(RequestError, match=r"the state of 10 tokens needs [\d,]+ bytes and 1,000 are free"):
        llm.logits([1] * 10)


# -- values -----------------------------------------------------------------------------------------------------


def test_public_values_have_the_fields_of_the_contract() -> None:
    assert clsa.RequestOutput is RequestOutput and clsa.Piece is Piece
    wanted = {"text", "token_ids", "finish_reason", "prompt_tokens", "cached_tokens", "logprobs"}
    assert wanted <= {field.name for field in fields(RequestOutput)}
    wanted = {"text", "token", "logprob", "prompt_tokens", "prompt_tps", "generation_tps"}
    assert wanted <= {field.name for field in fields(Piece)}


def test_stats(llm: LLM) -> None:
    wanted = {"running", "waiting", "pages_total", "pages_free", "prefix_tokens_hit", "preemptions"}
    assert wanted <= set(llm.stats())
    prompt = [7] * 200
    assert llm.generate(prompt, SHORT)[0].cached_tokens == 0
    output = llm.generate(prompt, SHORT)[0]
    assert output.cached_tokens == llm.stats()["prefix_tokens_hit"] == 192
    assert output.prompt_tokens == 200


def test_the_dtype_is_checked() -> None:
    with pytest.raises(clsa.ConfigError, match="dtype must be one of"):
        clsa.load(str(models.folder()), backend="numpy", dtype="int8")
