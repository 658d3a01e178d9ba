"""What a user imports: generate and stream."""

from __future__ import annotations

import gc
from dataclasses import fields, replace
from typing import Any, cast

import numpy as np
import pytest

import clsa
import clsa.inspect_model
from clsa import ClsaError, RequestError, SamplingParams
from clsa.llm import LLM
from clsa.outputs import Piece, RequestOutput
from tests.engine import models
from tests.engine.asking import close
from tests.engine.models import CONFIG, assert_all_returned, on_backends

TEXTS = ["def read(path):\n", "class Point:", "x", "漢字 😀 in a string", models.TEXT]
SHORT = SamplingParams(max_tokens=16, ignore_eos=True)


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
    llm._ops = cast(Any, ops)
    models.exchange_ops(llm, ops)
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
