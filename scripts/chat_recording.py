"""Record `clsa chat --file` with two documents of 30K tokens together, at a terminal of its own, as docs/chat.svg.

Run as: python scripts/chat_recording.py [--backend mlx] [--out docs/chat.svg]

The model has the demo's weights. Only `max_position_embeddings` is changed in its copy, which would otherwise refuse a
prompt of this length. The documents are the sources of two modules of the running Python.
"""

from __future__ import annotations

import argparse
import argparse as first_document
import csv as second_document
import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pyte

ROWS, COLUMNS = 46, 112
CELL_WIDTH, CELL_HEIGHT = 8.4, 18
CONTEXT = 40_960
DONE = re.compile(r"(\d+),\d{3} of [\d,]+ tokens, time left +0")  # thousands of tokens
QUESTION = "class CsvArgumentParser(ArgumentParser):"
COLOURS = {
    "default": "#d4d4d4",
    "black": "#555555",
    "red": "#f2777a",
    "green": "#99cc99",
    "brown": "#ffcc66",
    "blue": "#6699cc",
    "magenta": "#cc99cc",
    "cyan": "#66cccc",
    "white": "#d4d4d4",
}


class Screen(pyte.Screen):
    """Answers a program that asks where the cursor is."""

    def __init__(self, side: int) -> None:
        super().__init__(COLUMNS, ROWS)
        self._side = side

    def write_process_input(self, data: str) -> None:
        os.write(self._side, data.encode())


class Session:
    """One run of a command at a terminal."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.started = time.monotonic()
        self._side, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "XDG_STATE_HOME": str(folder / "state")}
        run = [sys.executable, "-m", "clsa_cli", *command]
        self._child = subprocess.Popen(
            run, cwd=folder, env=environment, stdin=other, stdout=other, stderr=other, start_new_session=True
        )
        os.close(other)
        self.screen = Screen(self._side)
        self._stream = pyte.ByteStream(self.screen)
        self._stream.feed("$ clsa {} \\\r\n    {}\r\n".format(" ".join(command[:-8]), " ".join(command[-8:])).encode())

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def wait(self, until: Callable[[str], bool], limit: float = 600) -> None:
        """Read what the program writes until the text of the screen is like this."""
        while not until(self.text()):
            ready, _, _ = select.select([self._side], [], [], limit)
            if not ready:
                raise TimeoutError(f"it did not come to this in {limit} s:\n{self.text()}")
            try:
                self._stream.feed(os.read(self._side, 4096))
            except OSError:  # how Linux says that nobody is there any more
                raise RuntimeError(f"the program ended:\n{self.text()}") from None

    def wait_for_prompt(self) -> None:
        self.wait(lambda text: text.endswith("\n>") and self.screen.cursor.x == 2)

    def ask(self, line: str) -> None:
        os.write(self._side, line.encode() + b"\r")
        self.wait(lambda text: line in text and not text.endswith(f"> {line}"))
        self.wait_for_prompt()

    def leave(self) -> None:
        os.write(self._side, b"\x04")
        self._child.wait(30)
        os.close(self._side)

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def rows(self) -> list[list[Any]]:
        """The cells of the lines in use."""
        return [[self.screen.buffer[y][x] for x in range(COLUMNS)] for y in range(self.text().count("\n") + 1)]


def prepare(folder: Path) -> list[str]:
    """The model and the documents in `folder`; returns the command line for them."""
    import clsa

    model = folder / "demo-40k"
    shutil.copytree(Path(clsa.__file__).parent / "assets/demo", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    files: list[str] = []
    for module in (first_document, second_document):
        files += ["--file", copied(module, folder)]
    return ["chat", "--model", model.name, *files, "--cache-dir", "kept"]


def copied(module: ModuleType, folder: Path) -> str:
    source = Path(str(module.__file__))
    shutil.copy(source, folder / source.name)
    return source.name


def record(command: list[str], folder: Path) -> list[tuple[str, list[list[Any]]]]:
    """Panels: what is said above a screen, and the screen."""
    first = Session(command, folder)
    first.wait(lambda text: (found := DONE.search(text)) is not None and int(found[1]) >= 13)
    panels = [(f"First start, after {first.seconds():.0f} s", first.rows())]
    first.wait_for_prompt()
    ready = first.seconds()
    first.ask(QUESTION)
    first.ask("/stats")
    panels.append((f"The same, ready after {ready:.0f} s", first.rows()))
    first.leave()
    second = Session(command, folder)
    second.wait_for_prompt()
    ready = second.seconds()
    second.ask(QUESTION)
    panels.append((f"Second start, ready after {ready:.1f} s", second.rows()))
    second.leave()
    return panels


def svg(panels: Sequence[tuple[str, list[list[Any]]]]) -> str:
    """Screens below each other, each character at its place whatever the font."""
    width = COLUMNS * CELL_WIDTH + 32
    parts: list[str] = []
    y = 0.0
    for title, rows in panels:
        height = len(rows) * CELL_HEIGHT + 44
        parts.append(f'<rect x="0" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="#1e1e1e"/>')
        parts.append(f'<text x="16" y="{y + 20:g}" fill="#999999" font-style="italic">{escape(title)}</text>')
        for i, row in enumerate(rows):
            parts += _runs(row, y + 44 + i * CELL_HEIGHT)
        y += height + 12
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {y - 12:g}" width="{width:g}" '
    font = 'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="14" xml:space="preserve">'
    return (
        "\n".join([head + font, "<title>clsa chat with a document of 30,000 tokens</title>", *parts, "</svg>"]) + "\n"
    )


def _runs(row: list[Any], y: float) -> list[str]:
    """Neighbouring cells of one style are one text."""
    texts = []
    for (colour, bold), cells in groupby(enumerate(row), key=lambda cell: (cell[1].fg, cell[1].bold)):
        run = list(cells)
        text = "".join(cell.data for _, cell in run)
        if not text.strip():
            continue
        x = 16 + (run[0][0] + len(text) - len(text.lstrip())) * CELL_WIDTH
        text = text.strip()
        fill = COLOURS.get(colour, colour if colour.startswith("#") else f"#{colour}")
        style = f'fill="{fill}"' + (' font-weight="bold"' if bold else "")
        place = f'x="{x:g}" y="{y:g}" textLength="{len(text) * CELL_WIDTH:g}"'
        texts.append(f"<text {place} {style}>{escape(text)}</text>")
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--backend", default="mlx")
    parser.add_argument("--out", type=Path, default=Path("docs/chat.svg"))
    options = parser.parse_args()
    out = options.out.absolute()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*prepare(folder), "--backend", options.backend]
        command += ["--temp", "0.6", "--top-p", "0.9", "--repetition-penalty", "1.1", "--max-tokens", "120"]
        out.write_text(svg(record(command, folder)), encoding="utf-8")
    print(f"wrote {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
