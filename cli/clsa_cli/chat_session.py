"""A conversation: what is said, what is kept, and the commands."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import ExitStack, closing, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from clsa import ClsaError, RequestError
from clsa.config import SamplingParams
from clsa_cli import chat_documents as documents
from clsa_cli import output
from clsa_cli.chat_documents import Document, Message
from clsa_cli.chat_input import Lines
from clsa_cli.chat_terminal import Interrupted, PrefillBar, View, stoppable, view
from clsa_cli.generate import check_text, reads

if TYPE_CHECKING:
    from clsa.llm import LLM
    from clsa.outputs import Piece

WITH_FILE = ("/file", "/load", "/save")
COMMANDS = ("/file", "/help", "/load", "/quit", "/reset", "/save", "/stats")
HELP = """\
/file PATH  put a document before the next message
/save PATH  write the conversation and its processed state to a file
/load PATH  go on with a conversation that /save wrote
/stats      what the conversation takes, reads and costs
/reset      forget the conversation, but not the documents it began with
/help       show this
/quit       leave; so do Ctrl-D and Ctrl-C at the prompt
Ctrl-C stops an answer and keeps what is there; a second Ctrl-C leaves. Anything else is a message, also q, r and h."""
_COMMAND = re.compile(r"(/[a-z]*)|(/(?:file|load|save)) +(\S.*)")


class Conversation:
    """Messages, and the model that answers them.

    Args: `start` the messages that every conversation begins with; `kept` the file that holds their state, if any;
    `plain` answers as they are, where Markdown would be rendered.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, start: list[Message], *, kept: Path | None, plain: bool
    ) -> None:
        self.llm, self.params, self.start, self.kept, self.plain = llm, params, start, kept, plain
        self.messages = list(start)
        self.pending: list[Document] = []
        self.last: Piece | None = None
        self.num_asked = self.num_cached = 0  # prompt tokens of all turns, and those found in the cache

    def run(self, lines: Lines, *, interactive: bool) -> None:
        """Answer line after line. What is refused ends a conversation only if nobody sits at it."""
        if interactive:
            output.note(f"{self.llm.device}; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        saved: list[Message] | None = None
        while (line := lines()) is not None:
            found = _COMMAND.fullmatch(line.strip())
            if found and found[1] == "/quit":
                break
            try:
                if found:
                    self._obey(found[1] or found[2], found[3])
                    saved = self.messages if found[2] in ("/save", "/load") else saved
                elif line.strip():
                    self._turn(check_text(line))
            except ClsaError as error:
                if not interactive:
                    raise
                output.error(str(error) if found else f"{error} (/reset forgets the conversation)")
        if interactive:
            output.note("left" if saved == self.messages else "left; the conversation is not kept")

    def _obey(self, command: str, argument: str | None) -> None:
        if command in WITH_FILE:
            if argument is None:
                raise RequestError(f"{command} needs a file: {command} PATH")
            {"/file": self._add, "/load": self._load, "/save": self._save}[command](_path(argument))
        elif command == "/reset":
            self._reset()
        elif command == "/stats":
            output.facts(self._stats(), stderr=True)
        elif command == "/help":
            typer.echo(HELP, err=True)
        else:
            output.error(f"there is no command {command}; /help lists them")

    def _turn(self, message: str) -> None:
        """Ask, print, and remember both sides. A turn that gave no text leaves the conversation as it was."""
        content = documents.as_text(self.pending) + message
        asked = [*self.messages, {"role": "user", "content": content}]
        answer, last = self._answer(asked)
        if answer:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
            self.pending = []
        if last is None:
            output.note("[stopped before the answer]")
            return
        self.last = last
        self.num_asked += last.prompt_tokens
        self.num_cached += last.cached_tokens
        output.note(
            f"[{last.generation_tps:,.1f} tokens/s, {last.cached_tokens:,} of "
            f"{output.count(last.prompt_tokens, 'prompt token')} from the cache"
            f"{', stopped' if last.finish_reason is None else ''}]"
        )

    def _answer(self, asked: list[Message]) -> tuple[str, Piece | None]:
        """Print the answer while it comes. Its text, and its last piece, if Ctrl-C did not come before the first."""
        parts: list[str] = []
        last: Piece | None = None
        with stoppable() as stopped, closing(PrefillBar(stopped)) as bar, ExitStack() as stack:
            stream = self.llm.chat(asked, self.params, stream=True, progress=bar)
            pieces = stack.enter_context(closing(cast("Generator[Piece, None, None]", stream)))
            shown: View | None = None
            with suppress(Interrupted):
                for last in pieces:
                    if shown is None:
                        bar.close()
                        shown = stack.enter_context(closing(view(plain=self.plain)))
                    parts.append(last.text)
                    shown.write(last.text)
                    if stopped.pressed:
                        break
        return "".join(parts), last

    def _add(self, path: Path) -> None:
        """Put a document before the next message, if it fits."""
        pending = [*self.pending, *documents.read_documents([path])]
        message = {"role": "user", "content": documents.as_text(pending)}
        num_tokens = len(self.llm.tokenizer.encode_chat([*self.messages, message]))
        what = f"the conversation with {documents.names(pending)}"
        documents.check_room(self.llm, num_tokens, what, self.params.max_tokens)
        self.pending = pending
        output.note(f"{documents.names(pending)}: read with your next message; {what} has {num_tokens:,} tokens")

    def _save(self, path: Path) -> None:
        if self.messages == self.start:
            raise RequestError("there is no answer to save yet; ask something first")
        if path.exists() and not _is_conversation(path):
            raise RequestError(f"{path} is there and is no saved conversation; give another name")
        num_tokens = self.llm.save_chat(path, self.messages)
        output.note(
            f"{path}: wrote {output.count(len(self.messages), 'message')} and the state of "
            f"{output.count(num_tokens, 'token')} ({output.size(path.stat().st_size)})"
        )

    def _load(self, path: Path) -> None:
        self.messages, num_tokens = self.llm.load_chat(path)
        self.start = list(takewhile(lambda message: message["role"] == "system", self.messages))
        self.pending, self.kept, self.last = [], None, None
        output.note(
            f"{path}: read {output.count(len(self.messages), 'message')} and the state of "
            f"{output.count(num_tokens, 'token')}"
        )

    def _reset(self) -> None:
        self.messages, self.pending, self.last = list(self.start), [], None
        if self.kept is not None:  # long conversations push the state of the documents out of the prefix cache
            try:
                self.llm.load_cache(self.kept)
            except ClsaError as error:
                output.note(f"{error}; the documents will be processed again")
        output.note("the conversation is forgotten")

    def _stats(self) -> list[tuple[str, str]]:
        from clsa.params import state_bytes_per_token, window_bytes

        config, last = self.llm.config, self.last
        per_token, window = state_bytes_per_token(config, self.llm.dtype), window_bytes(config, self.llm.dtype)
        state = f"{per_token:,} bytes per token, and {output.size(window)} of windows however long it is"
        hits = f"{self.num_cached:,} of {output.count(self.num_asked, 'prompt token')} in all turns"
        if last is None:
            return [("context", "no answer yet"), ("state", state), ("cache hits", hits)]
        context = last.prompt_tokens + last.generation_tokens
        return [
            ("context", f"{output.count(context, 'token')} of {self.llm.stats()['max_model_len']:,}"),
            ("state", f"{output.size(context * per_token + window)}: {state}"),
            ("reads", reads(config.index_topk_pattern, config.index_topk, last.prompt_tokens, last.generation_tokens)),
            ("prompt", f"{last.cached_tokens:,} of {output.count(last.prompt_tokens, 'token')} from the cache"),
            ("answer", f"{output.count(last.generation_tokens, 'token')}, {last.generation_tps:,.1f} tokens/s"),
            ("cache hits", hits),
            ("peak memory", output.size(last.peak_memory)),
        ]


def _path(argument: str) -> Path:
    try:
        path = Path(argument).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as error:  # such as a home that nobody has, or a zero character
        raise RequestError(f"{argument} cannot be used: {getattr(error, 'strerror', None) or error}") from None
    return path


def _is_conversation(path: Path) -> bool:
    from clsa.chat_file import KEY
    from clsa.tensor_file import read_metadata

    try:
        return path.is_file() and KEY in read_metadata(path, path)
    except ClsaError:
        return False
