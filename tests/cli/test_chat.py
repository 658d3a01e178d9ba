"""`clsa chat`: turns, history, commands, and Ctrl-C, which stops an answer and not the program."""

from __future__ import annotations

import signal
import time

import pytest

from clsa import SamplingParams
from tests.cli.conftest import Run, Start
from tests.cli.fake import FakeLLM

ANSWER = {"role": "assistant", "content": "Hello world"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_pipe_gives_one_answer_per_line_and_keeps_the_history(run: Run, fake: FakeLLM) -> None:
    result = run("chat", "--system", "Be brief", "--temp", "0.5", stdin="one\n\n  \r\ntwo\r\nthree")
    assert (result.exit_code, result.stdout) == (0, "Hello world\n" * 3)
    system = {"role": "system", "content": "Be brief"}
    first = [system, user("one")]
    second = [*first, ANSWER, user("two")]
    assert fake.asked == [first, second, [*second, ANSWER, user("three")]]
    assert fake.params == [SamplingParams(temperature=0.5)] * 3
    assert "[50.0 tokens/s, 4 of 20 prompt tokens from the cache]" in result.stderr
    assert fake.closed


def test_commands(run: Run, fake: FakeLLM) -> None:
    result = run("chat", "--system", "S", stdin="one\n/reset\ntwo\n/help\n/frob\n/usr/bin is what?\nq\n/quit\nnever\n")
    assert result.exit_code == 0
    system = {"role": "system", "content": "S"}
    two = [system, user("two")]
    path = [*two, ANSWER, user("/usr/bin is what?")]
    assert fake.asked == [[system, user("one")], two, path, [*path, ANSWER, user("q")]]
    for words in ("/reset      forget", "there is no command /frob", "the conversation is forgotten"):
        assert words in result.stderr


def test_what_the_conversation_takes(run: Run, fake: FakeLLM) -> None:
    result = run("chat", stdin="/stats\nzero\n/reset\none\n/stats\n")
    assert (result.exit_code, result.stdout) == (0, "Hello world\n" * 2)
    before, _, after = result.stderr.split("[50.0 tokens/s")
    assert "no answer yet" in before and "160 bytes per token" in before
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in after.splitlines()}
    assert rows["context"] == "context 12 tokens of 512"
    assert rows["state"].startswith("state 6.0 kB: 160 bytes per token, and 4.1 kB of windows")
    assert rows["reads"].startswith("reads the last step read 8 of the 11 tokens it saw, in 2 layers")
    assert rows["prompt"] == "prompt 4 of 10 tokens from the cache"
    assert rows["answer"] == "answer 2 tokens, 50.0 tokens/s"
    assert rows["cache hits"] == "cache hits 8 of 20 prompt tokens in all turns"
    assert rows["peak memory"] == "peak memory 12.0 MB"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/save", "/save needs a file: /save PATH"),
        ("/load   ", "/load needs a file"),
        ("/file", "/file needs a file"),
        ("/save out", "there is no answer to save yet"),
        ("/file /nowhere/x", "/nowhere/x cannot be read: No such file"),
        ("/load ~nobody-of-this-name/x", "~nobody-of-this-name/x cannot be used: "),
        ("/load x\0y", "cannot be used: embedded null byte"),
        (f"/load {'x' * 300}", "cannot be used: File name too long"),
    ],
)
def test_a_command_that_is_refused_ends_a_pipe(run: Run, fake: FakeLLM, line: str, words: str) -> None:
    result = run("chat", stdin=f"{line}\none\n")
    assert (result.exit_code, result.stdout, fake.asked) == (2, "", [])
    assert result.stderr.splitlines()[-1].startswith("error: ") and words in result.stderr


def test_a_turn_that_is_refused_ends_a_pipe(run: Run, fake: FakeLLM) -> None:
    result = run("chat", stdin="one\nrefuse this\nthree\n")
    assert (result.exit_code, result.stdout, len(fake.asked)) == (2, "Hello world\n", 1)
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_stdin_must_be_text(run: Run, fake: FakeLLM) -> None:
    result = run("chat", stdin=b"one\n\xff\n")
    assert (result.exit_code, result.stdout) == (2, "Hello world\n")
    assert "stdin is not UTF-8 text" in result.stderr


def test_a_model_without_a_template_cannot_chat(run: Run, fake: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.tokenizer, "has_chat_template", False, raising=False)
    result = run("chat", stdin="one\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "demo has no chat template" in result.stderr


def test_an_answer_without_text_leaves_the_history_as_it_was(run: Run, fake: FakeLLM) -> None:
    fake.say = [""]
    assert run("chat", stdin="one\ntwo\n").exit_code == 0
    assert fake.asked == [[user("one")], [user("two")]]


def test_ctrl_c_stops_the_answer_and_keeps_what_is_there(start: Start) -> None:
    child = start("chat", fake="FakeLLM(['tick '] * 200, delay=0.02)")
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(b"one\n")
    child.stdin.flush()
    assert child.stdout.read(5) == b"tick "
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(b"/quit\n", timeout=30)
    assert child.returncode == 0
    assert 0 <= stdout.count(b"tick") < 150 and b", stopped]" in stderr and b"Traceback" not in stderr


def test_ctrl_c_while_a_prompt_is_processed_stops_before_the_answer(start: Start) -> None:
    child = start("chat", fake="FakeLLM(delay=0.05, prefill=100)")
    assert child.stdin is not None and child.stderr is not None
    child.stdin.write(b"one\n")
    child.stdin.flush()
    assert child.stderr.readline().startswith(b"backend")
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    assert child.stderr.readline() == b"[stopped before the answer]\n"
    stdout, stderr = child.communicate(b"/quit\n", timeout=10)
    assert (child.returncode, stdout, stderr) == (0, b"", b"")


def test_a_second_ctrl_c_leaves(start: Start) -> None:
    child = start("chat", fake="FakeLLM(['tick ', 'tock '], delay=20)")
    assert child.stdin is not None and child.stderr is not None
    child.stdin.write(b"one\n")
    child.stdin.flush()
    assert child.stderr.readline().startswith(b"backend")
    time.sleep(1.0)  # into the first step
    for _ in range(2):
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, stderr = child.communicate(timeout=10)
    assert (child.returncode, stderr) == (130, b"")
