"""A conversation in a file goes on in another process from the ids it was generated with."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from clsa.cache_file import cache_key
from clsa.chat_file import KEY, MAX_CHAT_BYTES, chat_metadata
from clsa.config import SamplingParams
from clsa.errors import CheckpointError, ClsaError, RequestError
from clsa.llm import LLM
from clsa.outputs import RequestOutput
from tests.engine import models
from tests.engine.test_cache_file import read, write

SHORT = SamplingParams(max_tokens=40, ignore_eos=True)
ASKED = [{"role": "system", "content": models.TEXT}, {"role": "user", "content": "and then"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("chat") / "model")


def load(folder: Path) -> LLM:
    return models.load("cuda", folder)


def answered(llm: LLM, asked: list[dict[str, str]]) -> list[dict[str, str]]:
    text = cast(RequestOutput, llm.chat(asked, SHORT)).text
    return [*asked, {"role": "assistant", "content": text}]


def test_another_process_goes_on_as_this_one_would(folder: Path, tmp_path: Path) -> None:
    first, second = load(folder), load(folder)
    messages = answered(first, ASKED)
    tokens = first.save_chat(tmp_path / "chat", messages)
    assert tokens % 64 == 0 and tokens > 256
    assert second.load_chat(tmp_path / "chat") == (messages, tokens)
    following = [*messages, {"role": "user", "content": " why?"}]
    wanted, got = (cast(RequestOutput, llm.chat(following, SHORT)) for llm in (first, second))
    assert got.text == wanted.text and got.token_ids == wanted.token_ids
    assert got.cached_tokens == tokens, "all that was saved, though the answer would be tokenised otherwise"
    anew = second.tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert second._turn.prompt[: len(anew)] != anew, "or else this test shows nothing"


def test_ids_of_another_text_are_not_taken_up(folder: Path, tmp_path: Path) -> None:
    llm = load(folder)
    messages = answered(llm, ASKED)
    llm.save_chat(tmp_path / "chat", messages)
    header, data = read(tmp_path / "chat")
    changed = [{"role": "system", "content": models.TEXT + "X"}, *messages[1:]]
    header["__metadata__"][KEY] = chat_metadata(changed, [])[KEY]
    write(tmp_path / "changed", header, data)
    other = load(folder)
    assert other.load_chat(tmp_path / "changed")[0] == changed
    following = [*changed, {"role": "user", "content": " why?"}]
    assert (
        cast(RequestOutput, other.chat(following, SHORT)).text == cast(RequestOutput, llm.chat(following, SHORT)).text
    )


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        (None, "holds the state of a prompt and no conversation"),
        ("[]", "must be a JSON object"),
        ('{"messages": []}', "must have messages and tail"),
        ('{"messages": [], "tail": [-1]}', r"has the tail \[-1\]"),
        ('{"messages": [], "tail": [true]}', r"has the tail \[True\]"),
        (json.dumps({"messages": [], "tail": [1] * 64}), "must be fewer than 64 ids"),
        ('{"messages": [], "tail": []}', "is damaged: messages must be a list"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}], "tail": []}', "is damaged: "),
    ],
)
def test_bad_conversations_are_refused_in_one_sentence(
    folder: Path, tmp_path: Path, chat: str | None, words: str
) -> None:
    llm = load(folder)
    llm.save_chat(tmp_path / "chat", answered(llm, ASKED))
    header, data = read(tmp_path / "chat")
    metadata: dict[str, Any] = header["__metadata__"]
    if chat is None:
        del metadata[KEY]
    else:
        metadata[KEY] = chat
    write(tmp_path / "bad", header, data)
    other = load(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        other.load_chat(tmp_path / "bad")
    assert "\n" not in str(caught.value)
    assert other.stats()["pages_cached"] == 0, "nothing was taken up"


def test_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    llm = load(folder)
    llm.save_chat(tmp_path / "chat", answered(llm, ASKED))
    other = models.save(tmp_path / "other", weights=models.params(models.CONFIG, seed=1))
    with pytest.raises(CheckpointError, match="was written by another model"):
        load(other).load_chat(tmp_path / "chat")


def test_a_conversation_may_not_be_too_long() -> None:
    message = {"role": "user", "content": "x" * (MAX_CHAT_BYTES - 100)}
    assert len(chat_metadata([message], [5] * 70)[KEY]) <= MAX_CHAT_BYTES
    with pytest.raises(RequestError, match="at most 7340032 are saved"):
        chat_metadata([message | {"content": "é" * (MAX_CHAT_BYTES // 2)}], [])


def test_the_key_of_a_file_is_of_its_pages_and_of_what_binds_it(folder: Path) -> None:
    llm = load(folder)
    tokens = list(range(2, 202))
    key = llm.cache_key(tokens)
    assert key == load(folder).cache_key(tokens) and len(key) == 64
    assert key == llm.cache_key([*tokens[:192], 9]), "only whole pages are in a file"
    assert key not in {llm.cache_key([3, *tokens[1:]]), llm.cache_key(tokens[:191]), llm.cache_key(tokens, salt="x")}
    assert cache_key(tokens, {"a": "b"}) != cache_key(tokens, {"a": "c"})


def test_progress_tells_how_far_a_prompt_is(folder: Path) -> None:
    llm = models.load("cuda", folder, max_tokens_per_step=128)
    tokens = [(7 * i * i + i) % 320 for i in range(500)]
    seen: list[tuple[int, int]] = []
    pieces = llm.stream(tokens, SHORT, progress=lambda done, total: seen.append((done, total)))
    next(pieces)
    done = [done for done, _ in seen]
    assert done[0] == 0 and len(done) >= 4 and done == sorted(set(done))
    assert max(b - a for a, b in pairwise([*done, 500])) <= 128 and {total for _, total in seen} == {500}
    told = len(seen)
    assert len(list(pieces)) > 10 and len(seen) == told, "an answer is no progress of its prompt"
    seen.clear()
    list(llm.stream([*tokens[:448], 1, 2], SHORT, progress=lambda done, total: seen.append((done, total))))
    assert seen == [(448, 450)], "what was cached is done"


def test_what_progress_raises_ends_the_prompt_and_what_was_done_stays(folder: Path) -> None:
    llm = models.load("cuda", folder, max_tokens_per_step=128)
    tokens = [(7 * i * i + i) % 320 for i in range(900)]

    def stop(done: int, total: int) -> None:
        if done >= 640:
            raise ClsaError("enough")

    with pytest.raises(ClsaError, match="enough"):
        list(llm.stream(tokens, SHORT, progress=stop))
    models.assert_all_returned(llm.stats())
    assert llm.generate(tokens, SHORT)[0].cached_tokens >= 512
