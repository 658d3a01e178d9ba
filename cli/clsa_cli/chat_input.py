"""Lines of a conversation: edited and remembered at a terminal, or read from a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from clsa import RequestError
from clsa_cli import output
from clsa_cli.chat_store import history_file
from clsa_cli.generate import MAX_PROMPT_BYTES

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History

MAX_HISTORY_BYTES = 1 << 20  # then the older half is forgotten
MAX_HISTORY_ENTRY = 1 << 14  # characters; longer messages are not remembered

Lines = Callable[[], str | None]


def piped_line() -> str | None:
    """The next line of stdin without its end; None at the end of input."""
    data = sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1)
    if not data:
        return None
    if len(data) > MAX_PROMPT_BYTES:
        raise RequestError(f"a line of stdin is larger than {MAX_PROMPT_BYTES} bytes, the longest message; shorten it")
    try:
        return data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text: {error.reason} at byte {error.start} of a line") from None


def terminal_lines(commands: Sequence[str], with_file: Sequence[str]) -> Lines:
    """A function that asks for the next message; None after Ctrl-D or Ctrl-C. A paste may have several lines.

    Tab completes `commands`, and paths behind those `with_file`. What was typed is kept in `history_file()`.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    session: PromptSession[str] = PromptSession(
        history=_history(),
        completer=_completer(commands, with_file),
        complete_while_typing=False,
        output=create_output(stdout=sys.stdout if sys.stdout.isatty() else sys.stderr),
    )

    def line() -> str | None:
        try:
            return session.prompt("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=True)
            return None

    return line


def _completer(commands: Sequence[str], with_file: Sequence[str]) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class CommandCompleter(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            word, space, rest = text.partition(" ")
            if space and word in with_file:
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
            elif text.startswith("/") and not space:
                yield from (Completion(name, -len(text)) for name in commands if name.startswith(text))

    return CommandCompleter()


def _history() -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class BoundedHistory(FileHistory):
        def store_string(self, string: str) -> None:
            if len(string) <= MAX_HISTORY_ENTRY:
                super().store_string(string)

    try:
        path = history_file()
        prepare_history(path)
    except (OSError, RuntimeError) as error:
        output.note(f"what you type is not remembered: {error}")
        return InMemoryHistory()
    return BoundedHistory(path)


def prepare_history(path: Path) -> None:
    """Make the file, for its owner alone, or shorten it if it has grown long. Raises OSError if it cannot be used."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb+") as file:
        os.fchmod(file.fileno(), 0o600)
        if file.seek(0, os.SEEK_END) <= MAX_HISTORY_BYTES:
            return
        file.seek(-MAX_HISTORY_BYTES // 2, os.SEEK_END)
        _, entry, newer = file.read().partition(b"\n# ")  # every entry begins with a comment: when it was typed
        file.seek(0)
        file.write(entry + newer)
        file.truncate()
