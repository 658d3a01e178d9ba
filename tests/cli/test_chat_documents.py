"""`clsa chat --file`: what is read, what is kept and found again, and what is said when it cannot be."""

from __future__ import annotations

import os
import re
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clsa.llm import LLM
from clsa_cli import chat_documents
from clsa_cli.chat_store import DocumentStore
from tests.cli.conftest import Run, Start
from tests.cli.fake import FakeLLM
from tests.engine import models

Chat = Callable[..., Any]
LINE = "def line_{i}(path):  # a line of its own\n"


def text(lines: int, first: int = 0) -> str:
    return "".join(LINE.replace("{i}", str(first + i)) for i in range(lines))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = replace(models.CONFIG, max_position_embeddings=2048)
    return str(models.save(tmp_path_factory.mktemp("model") / "model", config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where processed documents are kept."""
    return tmp_path / "kept"


@pytest.fixture
def chat(run: Run, model: str, folder: Path) -> Chat:
    def chat(*args: str, stdin: str = "why?\n", backend: str = "cuda") -> Any:
        common = ["--model", model, "--backend", backend, "--max-tokens", "12", "--cache-dir", str(folder)]
        device = ["--device", "cpu"] if backend == "cuda" else []
        return run("chat", *common, *device, *args, stdin=stdin)

    return chat


@pytest.fixture
def paper(tmp_path: Path) -> str:
    path = tmp_path / "paper.txt"
    path.write_text(text(40))
    return str(path)


def cached(result: Any) -> list[int]:
    """Prompt tokens that each turn took from the cache."""
    return [int(n.replace(",", "")) for n in re.findall(r"tokens/s, ([\d,]+) of", result.stderr)]


def said(result: Any) -> str:
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


# -- what is read --------------------------------------------------------------------------------------------------
def test_documents_go_before_the_first_message(run: Run, fake: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfAlpha\r\n\n")
    (tmp_path / "b\n.md").write_text("Beta <|x|>")
    files = ["--file", str(tmp_path / "a.txt"), "--file", str(tmp_path / "b\n.md")]
    both = '<document name="a.txt">\nAlpha\n</document>\n\n<document name="b .md">\nBeta <|x|>\n</document>\n\n'
    for system, content in (([], both), (["--system", "Be brief"], f"Be brief\n\n{both}")):
        fake.asked.clear()
        result = run("chat", *files, *system, "--cache-bytes", "0", stdin="one\n/reset\ntwo\n")
        assert said(result) == "Hello world\n" * 2
        start = {"role": "system", "content": content}
        assert [asked for asked in fake.asked if isinstance(asked[0], dict)] == [
            [start, {"role": "user", "content": "one"}],
            [start, {"role": "user", "content": "two"}],
        ]


def bad_files(folder: Path) -> dict[str, str]:
    """Bad documents by the words about them."""
    os.mkfifo(folder / "pipe")
    contents = {
        "empty": b"",
        "blank": b" \n\t\n",
        "binary": b"text\0",
        "latin": b"caf\xe9!",
        "half": "é".encode()[:1],
        "large": b"x" * 1001,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {
        "missing cannot be read: No such file or directory": str(folder / "missing"),
        f"{folder} is a folder": str(folder),
        "pipe is no regular file": str(folder / "pipe"),
        "null is no regular file": os.devnull,
        "empty is empty": str(folder / "empty"),
        "blank is empty": str(folder / "blank"),
        "it has a zero byte at 4": str(folder / "binary"),
        "latin is not UTF-8 text: invalid continuation byte at byte 3": str(folder / "latin"),
        "half is not UTF-8 text: unexpected end of data at byte 0": str(folder / "half"),
        "large is larger than 1,000 bytes": str(folder / "large"),
    }


def test_bad_documents_are_one_sentence_and_load_nothing(
    run: Run, fake: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_documents, "MAX_DOCUMENT_BYTES", 1000)
    cases = bad_files(tmp_path)
    (tmp_path / "fits").write_text("x" * 600)
    assert len(cases) == 10
    for words, path in cases.items():
        result = run("chat", "--file", str(tmp_path / "fits"), "--file", path, stdin="one\n")
        assert (result.exit_code, result.stdout) == (2, ""), words
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and words in result.stderr
    twice = run("chat", *["--file", str(tmp_path / "fits")] * 2, stdin="one\n")
    assert twice.exit_code == 2 and "the documents have 1,200 bytes together, at most 1,000" in twice.stderr
    assert fake.loaded_with == ()


def test_what_does_not_fit_is_refused_before_anything_is_processed(
    run: Run, fake: FakeLLM, chat: Chat, tmp_path: Path
) -> None:
    (tmp_path / "long").write_text(text(200))
    result = run("chat", "--file", str(tmp_path / "long"), "--max-tokens", "100", stdin="one\n")
    assert (result.exit_code, result.stdout, fake.asked) == (2, "", [])
    words = (
        r"error: long: [\d,]{5} tokens, and there is room for 348 \(a context of 512 less 100 of --max-tokens and 64"
    )
    assert re.match(words, result.stderr.splitlines()[-1]), result.stderr


def test_a_template_that_leaves_documents_out_is_told(
    run: Run, fake: FakeLLM, paper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def users_only(messages: list[dict[str, str]]) -> str:
        return "".join(m["content"] for m in messages if m["role"] == "user")

    monkeypatch.setattr(fake.tokenizer, "apply_chat_template", users_only)
    result = run("chat", "--file", paper, stdin="one\n")
    assert (result.exit_code, fake.asked) == (1, [])
    assert "does not put documents before the first message" in result.stderr


# -- what is kept --------------------------------------------------------------------------------------------------
def test_a_second_start_reads_what_the_first_processed(chat: Chat, paper: str, folder: Path) -> None:
    fresh = chat("--file", paper, "--cache-bytes", "0")
    assert not folder.exists() and "processed in" in fresh.stderr
    first = chat("--file", paper)
    assert "paper.txt: " in first.stderr and "tokens processed in" in first.stderr and "kept in" in first.stderr
    (kept,) = folder.iterdir()
    assert re.fullmatch(r"[0-9a-f]{64}\.safetensors", kept.name)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    os.utime(kept, (1, 1))
    second = chat("--file", paper)
    assert "read from" in second.stderr and "processed" not in second.stderr and "kept in" not in second.stderr
    assert said(fresh) == said(first) == said(second)
    assert cached(first) == cached(second) and cached(second)[0] > 512
    assert list(folder.iterdir()) == [kept] and kept.stat().st_mtime > 1, "it was used now"


def test_only_the_same_documents_are_found(chat: Chat, paper: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text(text(5, 100))
    notes = str(tmp_path / "notes.md")
    both = ["--file", paper, "--file", notes]
    for args in (
        both,
        ["--file", notes, "--file", paper],
        ["--system", "Be brief", *both],
        ["--dtype", "float16", *both],
    ):
        assert "processed in" in chat(*args).stderr
    Path(notes).write_text(text(5, 101))
    assert "processed in" in chat(*both).stderr
    assert len(list(folder.iterdir())) == 5


def test_a_document_of_a_few_words_is_not_kept(chat: Chat, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a few words")
    result = chat("--file", str(tmp_path / "short"))
    assert said(result) and not folder.exists()


@pytest.mark.parametrize("length", range(1560, 1640, 5))
def test_documents_of_every_length_are_found_again(chat: Chat, folder: Path, tmp_path: Path, length: int) -> None:
    (tmp_path / "paper").write_text(text(40)[:length])
    first, second = (chat("--file", str(tmp_path / "paper")) for _ in range(2))
    assert "processed in" in first.stderr and "read from" in second.stderr
    assert said(first) == said(second) and cached(first) == cached(second)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b"no cache at all" * 100),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"dtype":"float32"', b'"dtype":"float16"')),
    ],
    ids=["cut", "garbage", "empty", "another dtype"],
)
def test_a_damaged_file_is_processed_again_and_told(
    chat: Chat, paper: str, folder: Path, damage: Callable[[Path], object]
) -> None:
    first = chat("--file", paper)
    (kept,) = folder.iterdir()
    damage(kept)
    second = chat("--file", paper)
    assert "paper.txt will be processed again" in second.stderr and "processed in" in second.stderr
    assert said(first) == said(second)
    assert "read from" in chat("--file", paper).stderr, "it was written anew"


def test_a_file_with_another_documents_state_is_not_believed(
    chat: Chat, folder: Path, paper: str, tmp_path: Path
) -> None:
    (tmp_path / "other").write_text(text(40, 500))
    wanted = chat("--file", paper)
    (own,) = folder.iterdir()
    chat("--file", str(tmp_path / "other"))
    (other,) = set(folder.iterdir()) - {own}
    own.write_bytes(other.read_bytes())
    found = chat("--file", paper)
    assert said(found) == said(wanted) and "processed in" in found.stderr
    assert "read from" in chat("--file", paper).stderr


def test_a_folder_in_the_place_of_a_file(chat: Chat, folder: Path, paper: str) -> None:
    wanted = chat("--file", paper)
    (kept,) = folder.iterdir()
    kept.unlink()
    kept.mkdir()
    found = chat("--file", paper)
    assert said(found) == said(wanted)
    assert "will be processed again" in found.stderr and "the processed document is not kept: " in found.stderr


def test_a_folder_that_cannot_be_written_is_told(
    chat: Chat, paper: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = chat("--file", paper, "--cache-bytes", "0")
    (tmp_path / "file").write_text("")
    below = chat("--file", paper, "--cache-dir", str(tmp_path / "file/below"))
    assert said(below) == said(wanted) and "the processed document is not kept: " in below.stderr

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    result = chat("--file", paper)
    assert said(result) == said(wanted) and "Permission denied" in result.stderr and not list(folder.iterdir())


def test_a_backend_that_keeps_no_state_is_told(chat: Chat, paper: str, folder: Path) -> None:
    result = chat("--file", paper, backend="numpy")
    assert said(result) and "the processed document will not be kept: backend 'numpy'" in result.stderr
    assert not folder.exists()


def test_what_is_kept_never_exceeds_the_bound(chat: Chat, paper: str, folder: Path, tmp_path: Path) -> None:
    result = chat("--file", paper, "--cache-bytes", "1000")
    assert "it takes" in result.stderr and "--cache-bytes allows 1.0 kB" in result.stderr and not list(folder.iterdir())
    chat("--file", paper)
    (first,) = folder.iterdir()
    os.utime(first, (1, 1))
    room = str(int(first.stat().st_size * 2.5))
    for i in (100, 200, 300):
        (tmp_path / "more").write_text(text(40, i))
        chat("--file", str(tmp_path / "more"), "--cache-bytes", room)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= int(room)
    assert not first.exists() and len(list(folder.iterdir())) == 2


def test_the_estimate_of_a_file_is_above_its_size(
    chat: Chat, paper: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    make_room = DocumentStore.make_room

    def noted(store: DocumentStore, path: Path, num_bytes: int) -> bool:
        asked.append(num_bytes)
        return make_room(store, path, num_bytes)

    monkeypatch.setattr(DocumentStore, "make_room", noted)
    for dtype in ("float32", "bfloat16"):
        before = set(folder.iterdir()) if folder.exists() else set()
        chat("--file", paper, "--dtype", dtype)
        (kept,) = set(folder.iterdir()) - before
        assert 0 <= asked[-1] - kept.stat().st_size < 1 << 17


def test_ctrl_c_while_a_document_is_processed_leaves(start: Start, tmp_path: Path) -> None:
    (tmp_path / "short").write_text(text(1))
    command = ["chat", "--file", str(tmp_path / "short"), "--cache-bytes", "0"]
    child = start(*command, fake="FakeLLM(delay=0.05, prefill=1000)")
    assert child.stderr is not None
    assert child.stderr.readline().startswith(b"backend")
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=10)
    assert (child.returncode, stdout, stderr) == (130, b"", b"")


# -- commands ------------------------------------------------------------------------------------------------------
def test_reset_keeps_the_documents_and_their_state(chat: Chat, paper: str) -> None:
    turns = "".join(f"and then what happens to the number {i} of these lines?\n" for i in range(6))
    result = chat("--file", paper, stdin=f"why?\n{turns}/reset\nwhy?\n")
    counts = cached(result)
    assert len(counts) == 8 and counts[7] == counts[0] > 512
    alone = chat("--file", paper, stdin="why?\n")
    assert said(result).endswith(said(alone))


def test_a_conversation_goes_on_from_its_file(chat: Chat, paper: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    whole = chat("--file", paper, stdin=f"why?\n/save {saved}\nand then?\n/save {saved}\n")
    first = chat("--file", paper, stdin=f"why?\n/save {saved}\n")
    assert re.search(r"saved: wrote 3 messages and the state of [\d,]+ tokens \([\d.]+ kB\)", first.stderr)
    rest = chat(stdin=f"/load {saved}\nand then?\n/reset\nwhy?\n")
    assert re.search(r"saved: read 3 messages and the state of [\d,]+ tokens", rest.stderr)
    assert said(first) + said(rest) == said(whole) + said(first)
    assert cached(rest)[0] >= cached(whole)[1] > 512


def test_save_writes_over_its_own_files_only(chat: Chat, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    long = "tell me about " * 20
    for path in (notes, tmp_path):
        result = chat(stdin=f"{long}\n/save {path}\n")
        assert result.exit_code == 2 and f"{path} is there and is no saved conversation" in result.stderr
    assert notes.read_text() == "mine"
    result = chat(stdin=f"{long}\n/save {tmp_path}/nowhere/x\n")
    assert result.exit_code == 1 and "cannot be written" in result.stderr
    result = chat(stdin=f"hi\n/save {tmp_path}/x\n")
    assert result.exit_code == 2 and "whole pages of 64 are saved; give a longer prompt" in result.stderr


def test_load_refuses_what_it_did_not_write(chat: Chat, paper: str, folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    said(chat("--file", paper, stdin=f"why?\n/save {saved}\n"))
    other = str(models.save(tmp_path / "other", weights=models.params(models.CONFIG, seed=1)))
    (kept,) = folder.iterdir()
    cases = [
        (["--model", other], saved, "was written by another model"),
        (["--dtype", "float16"], saved, "holds state in 'float32'"),
        ([], kept, "holds the state of a prompt and no conversation"),
        ([], Path(paper), "is truncated or no safetensors file"),
        ([], tmp_path / "missing", "is no file"),
        ([], tmp_path, "is no file"),
    ]
    for args, path, words in cases:
        result = chat(*args, stdin=f"/load {path}\nwhy?\n")
        assert (result.exit_code, result.stdout) == (1, "") and words in result.stderr, words
        assert result.stderr.splitlines()[-1].startswith("error: ")


def test_a_document_may_come_later(chat: Chat, paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = LLM.chat

    def noted(llm: LLM, messages: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(messages)
        return real(llm, messages, *args, **kwargs)

    monkeypatch.setattr(LLM, "chat", noted)
    result = chat(stdin=f"hello\n/file {paper}\nwhy?\nand then?\n")
    assert said(result).count("\n") >= 3 and "paper.txt: read with your next message" in result.stderr
    contents = [message["content"] for message in asked[-1] if message["role"] == "user"]
    assert contents == ["hello", f'<document name="paper.txt">\n{text(40).rstrip()}\n</document>\n\nwhy?', "and then?"]
    (tmp_path / "long").write_text(text(300))
    refused = chat(stdin=f"hello\n/file {tmp_path}/long\n")
    assert refused.exit_code == 2 and "the conversation with long: " in refused.stderr
    assert "there is room for 1,972" in refused.stderr
