"""Texts, growing answers, stop strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Impl

from clsa.errors import CheckpointError, RequestError
from clsa.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer, WholeDecoder, load_tokenizer
from tests.core.checkpoints import CONFIG as SMALL

SAMPLE = [
    "def f(x):\n    return x  # naïve café",
    "日本語の文字 and 한국어",
    "👩‍👩‍👧 family 🇫🇷 e\u0301",
    "hello world " * 3,
]
CONFIG = type(SMALL).from_dict(SMALL.to_dict() | {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": [1]})


def byte_level() -> Impl:
    impl = Impl(models.BPE())
    impl.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    impl.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    impl.train_from_iterator(SAMPLE * 4, trainer)
    impl.add_tokens([AddedToken("«added ü»", normalized=False)])
    impl.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return impl


def sentencepiece_like() -> Impl:
    """Metaspace and byte fallback, as Llama 2 has them."""
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "."]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    impl = Impl(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    impl.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    impl.add_special_tokens(["<unk>", "<bos>", "<eos>"])
    return impl


TOKENIZER = Tokenizer(byte_level(), CONFIG)
FALLBACK = Tokenizer(sentencepiece_like(), CONFIG)
IDS = st.lists(st.integers(0, CONFIG.vocab_size - 1), max_size=120)


def in_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


# -- whole texts ------------------------------------------------------------------------------------------------


def test_encode_and_decode() -> None:
    text = SAMPLE[0]
    ids = TOKENIZER.encode(text)
    assert ids[0] == 0
    assert ids[1:] == TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode("a<eos>b", add_special_tokens=False)[1] == 1
    assert TOKENIZER.encode("", add_special_tokens=False) == []
    assert TOKENIZER.decode([399, 1, 0]) == ""
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_ids) == (0, (1,))


@pytest.mark.parametrize("text", ["\ud800", None, b"bytes", ["a"], 3], ids=repr)
def test_what_is_not_text(text: Any) -> None:
    with pytest.raises(RequestError):
        TOKENIZER.encode(text)


@pytest.mark.parametrize("ids", [[-1], [1 << 40], ["a"], [None]], ids=repr)
def test_what_is_no_token(ids: Any) -> None:
    with pytest.raises(RequestError, match="token ids must be integers"):
        TOKENIZER.decode(ids)


def test_long_texts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.tokenizer.MAX_TEXT", 10)
    with pytest.raises(RequestError, match="at most 10 characters, got 11 characters"):
        TOKENIZER.encode("x" * 11)


def test_truncation_and_padding_of_the_file_are_not_for_prompts() -> None:
    impl = byte_level()
    impl.enable_truncation(4)
    impl.enable_padding(length=300)
    assert Tokenizer(impl, CONFIG).encode(SAMPLE[0]) == TOKENIZER.encode(SAMPLE[0])


# -- files ------------------------------------------------------------------------------------------------------


def test_load(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, CONFIG)
    assert tokenizer.encode(SAMPLE[1]) == TOKENIZER.encode(SAMPLE[1])
    assert tokenizer.vocab_size == TOKENIZER.vocab_size <= CONFIG.vocab_size
    assert not tokenizer.has_chat_template


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"ids up to \d+ but the model's vocab_size is 32"):
        load_tokenizer(tmp_path, SMALL)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[]", b'{"model": {"type": "BPE"}}'], ids=repr)
def test_damaged_tokenizers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer.json is damaged") as caught:
        load_tokenizer(tmp_path, CONFIG)
    assert "\n" not in str(caught.value)


def test_missing_large_and_linked_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        load_tokenizer(folder, CONFIG)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (folder / "tokenizer.json").symlink_to("../tokenizer.json")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        load_tokenizer(folder, CONFIG)
    monkeypatch.setattr("clsa.tokenizer.MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100 are read"):
        load_tokenizer(tmp_path, CONFIG)


def test_code_hooks_of_tokenizers(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "x.Y"}}))
    with pytest.raises(CheckpointError, match="asks to run code"):
        load_tokenizer(tmp_path, CONFIG)


# -- growing answers --------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(IDS)
@example([0] * 60)
@example([TOKENIZER.encode("👩", False)[0]] * 60)
def test_pieces_of_any_tokens_make_the_whole(ids: list[int]) -> None:
    """Also of tokens that are no text: stray bytes, unknown ids, special tokens."""
    assert "".join(in_pieces(TOKENIZER, ids)) == TOKENIZER.decode(ids)


@given(IDS, IDS)
def test_what_nobody_reads_in_pieces_comes_at_the_end(ids: list[int], more: list[int]) -> None:
    decoder = WholeDecoder(TOKENIZER)
    for some in (ids, more):  # nothing of the first is left behind
        assert "".join(map(decoder.push, some)) == ""
        assert decoder.flush() == TOKENIZER.decode(some)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80) | st.text("👩\u200d🇫e\u0301日本é\ufffd a", max_size=80))
@example("\ufffd" * 40)
@example("👩‍👩‍👧" * 12)
def test_pieces_of_text_never_hold_half_a_character(text: str) -> None:
    # A replacement character in the text itself looks like an unfinished run of byte-fallback tokens.
    for tokenizer in (TOKENIZER,) if "\ufffd" in text else (TOKENIZER, FALLBACK):
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode(ids)
        pieces = in_pieces(tokenizer, ids)
        assert "".join(pieces) == whole
        if "\ufffd" not in whole:
            assert not any("\ufffd" in piece for piece in pieces)
            assert pieces[-1] == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["é", "日", "👩", " ", "a", " ab", ".", "<eos>"]), min_size=30, max_size=90))
def test_pieces_of_byte_fallback_text_make_the_whole(words: list[str]) -> None:
    ids = [i for word in words for i in FALLBACK.encode(word, add_special_tokens=False)]
    assert "".join(in_pieces(FALLBACK, ids)) == FALLBACK.decode(ids)


def test_every_character_comes_with_its_last_token() -> None:
    text = "a日👩"
    ids = FALLBACK.encode(text, add_special_tokens=False)
    assert in_pieces(FALLBACK, ids) == ["a", "", "", "日", "", "", "", "👩", ""]


def test_an_answer_cut_inside_a_character_ends_with_the_replacement_character() -> None:
    ids = FALLBACK.encode("a👩", add_special_tokens=False)[:-1]
    assert in_pieces(FALLBACK, ids)[:-1] == ["a", "", "", ""]
    assert "".join(in_pieces(FALLBACK, ids)) == FALLBACK.decode(ids)


@pytest.mark.parametrize("token", ["a", "👩", "<eos>"])
def test_work_per_token_does_not_grow(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    decoded: list[int] = []
    whole = Tokenizer.decode

    def counted(self: Tokenizer, ids: Any) -> str:
        decoded.append(len(ids))
        return whole(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    stray = TOKENIZER.encode(token, add_special_tokens=False)[:1]  # the first byte of an emoji never completes
    in_pieces(TOKENIZER, stray * 2000)
    assert max(decoded) <= 65
    assert sum(decoded) <= 2000 * 80


# -- stop strings -----------------------------------------------------------------------------------------------


def matched(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher, given_out = StopMatcher(stops), ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        given_out += text
        if stopped:
            return given_out, True
    return given_out + matcher.flush(), False


def specified(stops: list[str], text: str) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        if lengths := [len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(lengths)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("ab", max_size=6), max_size=12),
)
def test_stop_strings_are_found_however_the_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    assert matched(stops, pieces) == specified(stops, "".join(pieces))


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\n\n", "END"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("two E") == ("\ntwo ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("Done") == ("", True)
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == ("the ", False)
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""


def test_no_stop_strings_hold_nothing_back() -> None:
    assert StopMatcher([]).push("anything") == ("anything", False)


def test_stop_strings_with_many_false_beginnings() -> None:
    text = "a" * 5000 + "b"
    assert matched(["a" * 1023 + "b"], list(text)) == ("a" * (5000 - 1023), True)
    assert matched(["a" * 1024], ["a" * 1023]) == ("a" * 1023, False)
