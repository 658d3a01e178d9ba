"""Documents of a conversation: read with care, put into words for the model, processed once and then kept."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from clsa import ClsaError, RequestError
from clsa.config import PAGE_SIZE, SamplingParams
from clsa_cli import output
from clsa_cli.chat_store import DocumentStore
from clsa_cli.chat_terminal import Interrupted, PrefillBar, stoppable

if TYPE_CHECKING:
    from collections.abc import Generator

    from clsa.llm import LLM
    from clsa.outputs import Piece

MAX_DOCUMENT_BYTES = 1 << 23  # of all documents together; a conversation may have twice as many characters
MESSAGE_ROOM = 64  # tokens of the context that documents leave for a first message
_OPEN_END = 16  # tokens in front of a message that its words may change
_PROBES = ("A", "\n")

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    text: str


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """The documents in these files. Raises RequestError if one is no text, or they are too much."""
    documents = [_read(path) for path in paths]
    size = sum(len(document.text.encode()) for document in documents)
    if size > MAX_DOCUMENT_BYTES:
        raise RequestError(
            f"the documents have {size:,} bytes together, at most {MAX_DOCUMENT_BYTES:,} are read; give fewer"
        )
    return documents


def _read(path: Path) -> Document:
    name = output.one_line(str(path))
    try:
        with open(path, "rb", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RequestError(f"{name} is no regular file; give a text file")
            data = file.read(MAX_DOCUMENT_BYTES + 1)
    except IsADirectoryError:
        raise RequestError(f"{name} is a folder; give the text files in it one by one") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_DOCUMENT_BYTES:
        raise RequestError(
            f"{name} is larger than {MAX_DOCUMENT_BYTES:,} bytes, the longest document; give a part of it"
        )
    if (at := data.find(0)) >= 0:
        raise RequestError(f"{name} is no text: it has a zero byte at {at}; convert it to UTF-8 text first")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text: {error.reason} at byte {error.start}; convert it to UTF-8 text first"
        ) from None
    if not text.strip():
        raise RequestError(f"{name} is empty; give a document with text in it")
    return Document(output.one_line(path.name), text)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe without a writer would block for ever


def as_text(documents: Sequence[Document]) -> str:
    """What the model reads."""
    return "".join(f'<document name="{d.name}">\n{d.text.rstrip()}\n</document>\n\n' for d in documents)


def names(documents: Sequence[Document]) -> str:
    return ", ".join(document.name for document in documents)


def leading_tokens(llm: LLM, start: Sequence[Message], text: str) -> list[int]:
    """The ids with which every conversation begins that begins with `start`, whatever is asked first.

    Raises ClsaError if the chat template leaves `text` out of them.
    """
    one, other = (llm.tokenizer.apply_chat_template([*start, {"role": "user", "content": probe}]) for probe in _PROBES)
    common = one[: next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), len(one))]
    if text.strip() not in common:
        raise ClsaError("the chat template of this model does not put documents before the first message")
    return llm.tokenizer.encode(common, add_special_tokens=False)


def check_room(llm: LLM, num_tokens: int, what: str, max_tokens: int) -> None:
    """Raise RequestError, with the sizes, if an answer and a message do not fit behind so many tokens."""
    sizes = llm.stats()
    context = min(sizes["max_model_len"], sizes["max_tokens_in_memory"])
    room = context - max_tokens - MESSAGE_ROOM
    if num_tokens > room:
        raise RequestError(
            f"{what}: {num_tokens:,} tokens, and there is room for {max(0, room):,} (a context of {context:,} less "
            f"{max_tokens:,} of --max-tokens and {MESSAGE_ROOM} for a message); give a part of it, or a model with a "
            "longer context"
        )


def process(llm: LLM, tokens: list[int], what: str, store: DocumentStore | None) -> Path | None:
    """Bring the state of `tokens` into the prefix cache, from the store if it is there, and keep it there if not.

    `what` names the documents in notes. Returns the file that holds the state, if any. Ctrl-C raises
    KeyboardInterrupt between two steps.
    """
    whole = max(0, len(tokens) - _OPEN_END) // PAGE_SIZE * PAGE_SIZE
    pages = tokens[: whole + 1]  # and one, because the last token of a prompt is always computed
    path = _find(llm, pages, store) if store is not None and whole else None
    loaded = path is not None and _load(llm, path, what)
    started = time.perf_counter()
    cached = _prefill(llm, pages)
    if store is None or path is None or not loaded or cached < whole:
        seconds = time.perf_counter() - started
        output.note(f"{what}: {output.count(len(tokens), 'token')} processed in {seconds:.1f} s")
        return path if store is not None and path is not None and _keep(llm, pages, store, path) else None
    store.touch(path)
    output.note(f"{what}: {output.count(len(tokens), 'token')}, read from {path.parent}")
    return path


def _find(llm: LLM, tokens: list[int], store: DocumentStore) -> Path | None:
    try:
        return store.path(llm.cache_key(tokens))
    except ClsaError as error:
        output.note(f"the processed document will not be kept: {error}")
        return None


def _load(llm: LLM, path: Path, what: str) -> bool:
    try:
        if not path.exists():
            return False
        llm.load_cache(path)
    except (ClsaError, OSError) as error:
        output.note(f"{_reason(error)}; {what} will be processed again")
        return False
    return True


def _prefill(llm: LLM, tokens: list[int]) -> int:
    """Compute what is not cached. Returns how many tokens were."""
    one = SamplingParams(max_tokens=1)
    with stoppable() as stopped, closing(PrefillBar(stopped)) as bar:
        try:
            with closing(cast("Generator[Piece, None, None]", llm.stream(tokens, one, progress=bar))) as pieces:
                return [piece.cached_tokens for piece in pieces][-1]
        except Interrupted:
            raise KeyboardInterrupt from None


def _keep(llm: LLM, tokens: list[int], store: DocumentStore, path: Path) -> bool:
    from clsa.params import state_bytes_per_token, window_bytes

    rows = len(tokens) * (4 + state_bytes_per_token(llm.config, llm.dtype))
    num_bytes = rows + window_bytes(llm.config, llm.dtype) + (1 << 16)  # the header
    try:
        if not store.make_room(path, num_bytes):
            output.note(
                f"the processed document is not kept: it takes {output.size(num_bytes)}, and --cache-bytes allows "
                f"{output.size(store.max_bytes)}"
            )
            return False
        llm.save_cache(path, tokens)
        path.chmod(0o600)
    except (ClsaError, OSError) as error:
        output.note(f"the processed document is not kept: {_reason(error)}")
        return False
    output.note(f"kept in {path.parent} ({output.size(path.stat().st_size)})")
    return True


def _reason(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
