"""`clsa chat`: turns, history, commands, and Ctrl-C, which stops an answer and not the program."""

from __future__ import annotations

import os
import pty
import select
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
    for words in ("/reset  forget", "there is no command /frob", "the conversation is forgotten"):
        assert words in result.stderr


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


class Terminal:
    """A terminal with a person at it."""

    def __init__(self, start: Start, fake: str) -> None:
        self.side, other = pty.openpty()
        self.child = start("chat", fake=fake, stdin=other, stdout=other, stderr=other, start_new_session=True)
        os.close(other)
        self.seen = b""

    def interrupt_until(self, words: bytes) -> None:
        """Ctrl-C as a person presses it: again if nothing happens. CPython can miss one just after the prompt."""
        for _ in range(10):
            self.child.send_signal(signal.SIGINT)
            try:
                return self.wait_for(words, seconds=2)
            except AssertionError:
                continue
        raise AssertionError(f"{words!r} did not come, only {self.seen!r}")

    def wait_for(self, words: bytes, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.seen:
            ready, _, _ = select.select([self.side], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{words!r} did not come, only {self.seen!r}"
            self.seen += os.read(self.side, 4096)
        self.seen = self.seen.split(words, 1)[1]

    def type(self, keys: bytes) -> None:
        os.write(self.side, keys)


@pytest.mark.parametrize("goodbye", ["ctrl-d", "ctrl-c"])
def test_a_conversation_at_a_terminal(start: Start, goodbye: str) -> None:
    person = Terminal(start, "FakeLLM(['tick ', '[b]\\x1b[31m '] + ['tock '] * 200, delay=0.02)")
    person.wait_for(b"/help lists the commands")
    person.wait_for(b"> ")
    person.type(b"one\n")
    person.wait_for("[b]␛[31m tock".encode())  # a model's control characters never reach a terminal
    person.child.send_signal(signal.SIGINT)
    person.wait_for(b"stopped]")
    person.wait_for(b"> ")
    person.type(b"please refuse\n")
    person.wait_for(b"/reset forgets the conversation")
    person.wait_for(b"> ")
    if goodbye == "ctrl-d":
        person.type(b"\x04")
        person.wait_for(b"the conversation is not kept")
    else:
        person.interrupt_until(b"the conversation is not kept")
    assert person.child.wait(20) == 0
    os.close(person.side)
