"""`clsa chat` for a person at a terminal: typed and pasted lines, what is remembered, bars, Markdown."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import stat
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest

from clsa_cli.chat_input import MAX_HISTORY_BYTES, prepare_history
from clsa_cli.chat_terminal import block_end
from tests.cli.conftest import Start

ROWS, COLUMNS = 24, 80


class _Screen(pyte.HistoryScreen):
    """Answers a program that asks where the cursor is."""

    def __init__(self, side: int) -> None:
        super().__init__(COLUMNS, ROWS, history=10_000, ratio=1.0)
        self._side = side

    def write_process_input(self, data: str) -> None:
        os.write(self._side, data.encode())


class Terminal:
    """A terminal with a person at it."""

    def __init__(self, start: Start, fake: str, *args: str) -> None:
        self.side, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.child = start("chat", *args, fake=fake, stdin=other, stdout=other, stderr=other, start_new_session=True)
        os.close(other)
        self.raw = b""
        self.screen = _Screen(self.side)
        self._stream = pyte.ByteStream(self.screen)

    def shown(self) -> str:
        """All lines that are on the screen or were, without the spaces at their ends."""
        above = ["".join(line[x].data for x in range(COLUMNS)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip()

    def wait(self, until: Callable[[], bool], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            ready, _, _ = select.select([self.side], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"it did not come to this:\n{self.shown()}"
            data = os.read(self.side, 4096)
            self.raw += data
            self._stream.feed(data)

    def wait_for(self, words: str, seconds: float = 20) -> None:
        self.wait(lambda: words in self.shown(), seconds)

    def wait_for_prompt(self) -> None:
        """An empty prompt on the last line; a line that was typed before does not count."""
        self.wait(lambda: self.shown().endswith("\n>") and self.screen.cursor.x == 2)

    def type(self, keys: str) -> None:
        os.write(self.side, keys.encode())

    def leave(self) -> None:
        self.wait_for_prompt()
        self.type("\x04")
        self.wait_for("left")
        assert self.child.wait(20) == 0
        os.close(self.side)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where history is kept."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return tmp_path


@pytest.fixture
def sit(start: Start) -> Iterator[Callable[..., Terminal]]:
    """Sit down at a terminal; whatever still runs at the end is ended."""
    people: list[Terminal] = []

    def sit(fake: str = "FakeLLM()", *args: str) -> Terminal:
        people.append(Terminal(start, fake, *args))
        people[-1].wait_for_prompt()
        return people[-1]

    yield sit
    for person in people:
        if person.child.poll() is None:
            person.child.kill()
            person.child.wait()


@pytest.mark.parametrize("goodbye", ["ctrl-d", "ctrl-c"])
def test_a_conversation(sit: Any, goodbye: str) -> None:
    person = sit("FakeLLM(['tick ', '[b]\\x1b[31m '] + ['tock '] * 400, delay=0.02)")
    person.type("one\r")
    person.wait_for("tick [b]␛[31m tock")
    person.child.send_signal(signal.SIGINT)
    person.wait_for(", stopped]")
    person.wait_for_prompt()
    person.type("please refuse\r")
    person.wait_for("/reset forgets the conversation")
    person.wait_for_prompt()
    person.type("/frob\r")
    person.wait_for("there is no command /frob")
    person.wait_for_prompt()
    person.type("\x04" if goodbye == "ctrl-d" else "\x03")
    person.wait_for("the conversation is not kept")
    assert person.child.wait(20) == 0
    assert b"\x1b[31m tock" not in person.raw, "a model's control characters never reach a terminal"


def test_a_paste_of_several_lines_is_one_message(sit: Any) -> None:
    person = sit("FakeLLM(['Yes.'])")
    person.type("\x1b[200~def f():\r    return 1\r/quit\x1b[201~")
    person.wait_for("/quit")
    assert "Yes." not in person.shown()
    person.type("\r")
    person.wait_for("Yes.")
    person.wait_for("4 of 10 prompt tokens from the cache]")
    person.leave()


def test_lines_are_edited_and_remembered(sit: Any, home: Path) -> None:
    person = sit("FakeLLM(['Yes.'])")
    person.type("world\x01hello \r")  # Ctrl-A is the beginning of the line
    person.wait_for("> hello world\nYes.")
    person.leave()
    history = home / "state/clsa/chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600 and stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    assert history.read_text().splitlines()[-1] == "+hello world"
    again = sit("FakeLLM(['Again.'])")
    again.type("\x1b[A")  # up
    again.wait_for("> hello world")
    again.type("!\r")
    again.wait_for("> hello world!\nAgain.")
    again.leave()


def test_tab_completes_commands_and_paths(sit: Any, home: Path) -> None:
    (home / "a long name.txt").write_text("x")
    person = sit()
    person.type("/res\t")
    person.wait_for("> /reset")
    person.type("\r")
    person.wait_for("> /reset\nthe conversation is forgotten")
    person.wait_for_prompt()
    person.type(f"/file {home}/a lo\t")
    person.wait(lambda: "a long name.txt" in person.shown().replace("\n", ""))
    person.type("\r")
    person.wait_for("\na long name.txt: read with your next message")
    person.leave()


def test_a_history_that_cannot_be_kept_is_told(sit: Any, home: Path) -> None:
    (home / "state").write_text("a file where the folder should be")
    person = sit()
    assert "what you type is not remembered" in person.shown()
    person.type("one\r")
    person.wait_for("Hello world")
    person.leave()


def test_a_long_history_loses_its_older_half(tmp_path: Path) -> None:
    path = tmp_path / "new/history"
    prepare_history(path)
    assert path.read_bytes() == b""
    entries = [f"\n# 2026-01-01 00:00:00\n+message {i}\n+# of two lines\n" for i in range(30_000)]
    path.write_text("".join(entries))
    path.chmod(0o644)
    prepare_history(path)
    kept = path.read_text()
    assert MAX_HISTORY_BYTES // 2 - 100 < len(kept) <= MAX_HISTORY_BYTES // 2
    assert "".join(entries).endswith(kept) and kept.startswith("\n# 2026") and path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    prepare_history(path)
    assert path.read_bytes() == before


def test_a_long_prompt_shows_a_bar_and_the_time_left(sit: Any) -> None:
    person = sit("FakeLLM(['Done.'], delay=0.1, prefill=12)")
    person.type("one\r")
    person.wait_for("of 24,000 tokens, time left")
    person.wait(lambda: "2,000 of 24,000" in person.shown() and "0:00:0" in person.shown())
    person.wait_for("Done.")
    person.wait_for_prompt()
    assert "processing" not in person.shown(), "the bar is gone"
    person.leave()


def test_ctrl_c_stops_a_prompt(sit: Any) -> None:
    person = sit("FakeLLM(['Done.'], delay=0.1, prefill=1000)")
    person.type("one\r")
    person.wait_for("of 2,000,000 tokens")
    person.child.send_signal(signal.SIGINT)
    person.wait_for("[stopped before the answer]")
    person.leave()


def test_a_document_and_the_demo_model(sit: Any, home: Path) -> None:
    (home / "module.py").write_text("".join(f"def function_{i}(x):\n    return x + {i}\n\n\n" for i in range(330)))
    command = ["--file", str(home / "module.py"), "--cache-dir", str(home / "kept"), "--max-tokens", "8"]
    shown: list[str] = []
    bars: list[bool] = []
    for _ in range(2):
        person = sit("clsa", *command, "--backend", "cuda", "--device", "cpu")
        person.type("def function_5\r")
        person.wait_for("tokens/s")
        person.leave()
        shown.append(person.shown())
        bars.append(b" tokens, time left" in person.raw)
    first, second = shown
    assert bars == [True, False]
    assert "tokens processed in" in first and "kept in" in first and "read from" in second
    answers = [re.search(r"> def function_5\n(.*?)\n\[", text, re.DOTALL) for text in shown]
    assert answers[0] and answers[1] and answers[0][1] == answers[1][1]


MARKDOWN = """\
# Title

Some **bold** words and a [link](https://example.org/x).

- one
- two

  still two

```python
def f(x):

    return x
```

1. first

2. second

The end &#27;[31m &#x9b;31m \x1b[31m <b>."""


def test_markdown_is_rendered_while_it_comes(sit: Any) -> None:
    pieces = [MARKDOWN[i : i + 3] for i in range(0, len(MARKDOWN), 3)]
    person = sit(f"FakeLLM({pieces!r}, delay=0.005)")
    person.type("one\r")
    person.wait_for("tokens/s")
    person.leave()
    shown = person.shown()
    for rendered in ("Some bold words", "link (https://example.org/x)", " • one\n • two", "def f(x):", " 2 second"):
        assert rendered in shown, rendered
    for source in ("**", "```", "# Title"):
        assert source not in shown, source
    for once in ("bold", "still two", "return x", "The end"):
        assert shown.count(once) == 1, f"what was shown while it came is gone: {once}"
    assert not any(code in person.raw for code in (b"\x1b[31m", b"\x9b31m", "\x9b31m".encode()))


def test_plain_shows_what_the_model_said(sit: Any) -> None:
    person = sit("FakeLLM(['Some **bold** words\\n\\n- one'])", "--plain")
    person.type("one\r")
    person.wait_for("Some **bold** words\n\n- one")
    person.leave()


def test_a_model_that_only_continues_texts_is_shown_plain(sit: Any) -> None:
    person = sit("FakeLLM(['    def __init__(self):\\n        pass'], ends_prompt='')")
    person.type("class A:\r")
    person.wait_for("\n    def __init__(self):\n        pass\n[50.0 tokens/s")
    person.leave()


def test_a_block_longer_than_the_screen_shows_its_end_and_then_all_of_it(sit: Any) -> None:
    words = [f"word{i} " for i in range(600)]
    person = sit(f"FakeLLM({words!r}, delay=0.003)")
    person.type("one\r")
    person.wait(lambda: "word300" in person.shown() and "word599" not in person.shown())
    person.wait_for("tokens/s")
    person.leave()
    shown = person.shown().replace("\n", " ").split()
    assert [word for word in shown if word.startswith("word")] == [word.strip() for word in words]


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("one", ""),
        ("one\ntwo\n", ""),
        ("one\n\n", ""),
        ("one\n\nt", "one\n\n"),
        ("one\n\ntwo\n\nthree", "one\n\ntwo\n\n"),
        ("one\n \n\ntwo", "one\n \n\n"),
        ("- one\n\n  more", ""),
        ("- one\n\n- two", "- one\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("````\n```\n\nb\n```\n\nc", ""),
        ("~~~\n```\n\nb\n~~~\n\nc", "~~~\n```\n\nb\n~~~\n\n"),
        ("```\na\n\n```python\n\nb", ""),
        ("a\n\n```\nb", "a\n\n"),
    ],
)
def test_where_a_block_ends(text: str, ended: str) -> None:
    assert text[: block_end(text)] == ended
