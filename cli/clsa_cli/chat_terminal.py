"""What a person at a terminal sees and presses: Ctrl-C, how far a prompt is, and answers as they come."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from clsa_cli import output
from clsa_cli.output import CONTROL_SYMBOLS

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.text import Text

BAR_TOKENS = 1024  # a prompt with fewer to compute is over before a bar could be read
_REFRESH_SECONDS = 0.1
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Interrupted(Exception):
    """Ctrl-C while a prompt was processed; raised between two steps."""


class Stopped:
    """Whether Ctrl-C was pressed; a second one raises KeyboardInterrupt, wherever the program is."""

    def __init__(self) -> None:
        self.pressed = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


@contextlib.contextmanager
def stoppable() -> Iterator[Stopped]:
    """Ctrl-C sets a flag that is read between steps: an exception inside a step would leave it half done."""
    stopped = Stopped()
    before = signal.signal(signal.SIGINT, stopped.handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


class PrefillBar:
    """Takes tokens done and all tokens of a prompt, and raises Interrupted after Ctrl-C.

    Where stderr is a terminal and the prompt is long, a bar with the time left is shown until `close`.
    """

    def __init__(self, stopped: Stopped) -> None:
        self._stopped = stopped
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._stopped.pressed:
            raise Interrupted
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif sys.stderr.isatty() and total - done > BAR_TOKENS:
            self._bar = _bar(done, total)
            self._bar.start()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(done: int, total: int) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # The output streams stay as they are: nothing else is written meanwhile.
    bar = Progress(
        TextColumn("processing", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, time left", markup=False),
        TimeRemainingColumn(),
        console=output.console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task("", total=total, completed=done)
    return bar


class View(Protocol):
    """Where one answer goes, piece by piece."""

    def write(self, text: str) -> None: ...
    def close(self) -> None: ...


def view(*, plain: bool) -> View:
    """For a terminal Markdown is rendered, if it is not to be `plain`; else text goes out as it is."""
    return PlainView() if plain or not sys.stdout.isatty() else MarkdownView()


class PlainView:
    """The text, and a line end if it has none."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        output.write(text)
        self._last = text[-1:] or self._last

    def close(self) -> None:
        if self._last != "\n":
            output.write("\n")


class MarkdownView:
    """Renders Markdown block by block; the end of what has come of a block is shown as text below.

    Links are written out, so that where they lead can be read.
    """

    def __init__(self) -> None:
        from rich.live import Live

        self._console = output.console()
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()
        self._block = ""
        self._shown = 0.0
        self._blocks = 0

    def write(self, text: str) -> None:
        new_line = "\n" in text or self._block.endswith("\n")
        self._block += text.translate(CONTROL_SYMBOLS)
        if new_line and (end := block_end(self._block)):
            self._print(self._block[:end])
            self._block = self._block[end:]
        if time.monotonic() - self._shown > _REFRESH_SECONDS:
            self._live.update(self._tail(), refresh=True)
            self._shown = time.monotonic()

    def close(self) -> None:
        self._live.stop()
        self._print(self._block)
        self._block = ""

    def _print(self, block: str) -> None:
        from rich.markdown import Markdown

        if not block.strip():
            return
        if self._blocks:
            self._console.print()
        self._blocks += 1
        self._console.print(Markdown(block, code_theme="ansi_dark", hyperlinks=False))

    def _tail(self) -> Text:
        """As many of the last lines as fit on the screen, of which a block as a whole may have more."""
        from rich.text import Text

        height, width = max(1, self._console.height - 2), self._console.width
        lines = Text(self._block[-height * width :]).wrap(self._console, width)
        return Text("\n").join(lines[-height:])


def block_end(text: str) -> int:
    """Where the last block of Markdown begins that may still go on; what is before may be rendered by itself.

    A block ends at an empty line that is not inside a code fence and is not followed by an indented line, which could
    belong to a list item above.
    """
    end = position = 0
    fence = ""
    empty = False
    for line in text.splitlines(keepends=True):
        if not fence and empty and line.strip() and not line[0].isspace():
            end = position
        found = _FENCE.match(line)
        if found and not fence:
            fence = found[1]
        elif found and found[1].startswith(fence) and not line[found.end() :].strip():
            fence = ""
        empty = not line.strip()
        position += len(line)
    return end
