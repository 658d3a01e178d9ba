"""Source files: which of a folder belong in a corpus, and what of them is read."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clsa.errors import TrainError

HELD_OUT_SHARE = 0.04  # of the files
MAX_FILE_BYTES = 400_000  # larger sources are generated (CPython: pydoc_data/topics.py)
MAX_CORPUS_BYTES = 1 << 31  # the corpus is held in memory

# In CPython 3.11 a share of 0.15 of the visible characters parts code from character maps (0.17 to 0.45) and
# from tests that are mostly vectors. Short files are kept: there a few constants are a large share.
_NUMBER = re.compile(r"\\x[0-9a-fA-F]{2}|\\[uU][0-9a-fA-F]{4,8}|\b0[xX][0-9a-fA-F_]+|[0-9]")
_MAX_NUMBER_SHARE = 0.15
_SHORT = 2000  # characters

_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}
# Build settings hold paths of the machine that built Python; the lib2to3 fixtures are Python 2.
_STDLIB_EXCLUDED = ("_sysconfigdata", "config-", "lib2to3/tests/data/")


@dataclass(frozen=True, slots=True)
class Document:
    """One source file: its path relative to the root, with forward slashes, and its normalised text."""

    path: str
    text: str

    def render(self) -> str:
        """What the model reads between `<|bos|>` and `<|eos|>`; the first line lets a prompt name a file."""
        return f"# file: {self.path}\n{self.text}"

    @property
    def held_out(self) -> bool:
        """Decided by the path alone, so that a file stays on its side when others come and go."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def find_files(root: Path, glob: str = "*.py") -> list[Path]:
    """Files under `root` whose name or relative path matches `glob`, sorted by relative path.

    Hidden files, installed packages and links that lead out of `root` are left out. Raises TrainError.
    """
    root = root.resolve()
    if not root.is_dir():
        raise TrainError(f"the corpus folder {root} does not exist or is not a folder")
    try:
        if not glob:
            raise ValueError("an empty pattern")
        found = [path for path in root.rglob(glob) if path.is_file() and path.resolve().is_relative_to(root)]
    except (ValueError, NotImplementedError) as error:
        raise TrainError(f"--glob must be a relative pattern such as '*.py', got {glob!r}") from error
    names = {path.relative_to(root): path for path in found}
    kept = [n for n in names if not any(part.startswith(".") or part in _FOREIGN for part in n.parts)]
    return [names[name] for name in sorted(kept, key=Path.as_posix)]


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The standard library's own sources (default: of the running Python), with `test` if it is installed.

    Left out are build settings and files that are not Python 3 in UTF-8.
    """
    root = Path(sysconfig.get_path("stdlib") if root is None else root).resolve()
    files = [f for f in find_files(root) if not f.relative_to(root).as_posix().startswith(_STDLIB_EXCLUDED)]
    return [file for file in files if _parses(file)]


def _parses(file: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(_read(file))
        except (SyntaxError, ValueError):
            return False
    return True


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TrainError(f"cannot read {file}: {error.strerror}") from error


def read_documents(root: Path, files: Sequence[Path]) -> tuple[list[Document], Counter[str]]:
    """The documents in the order of `files`, and how many files were left out for which reason.

    Text is UTF-8, line ends are `\\n`, tabs are expanded to 4 columns. Raises TrainError on unreadable
    files and on a corpus above `MAX_CORPUS_BYTES`.
    """
    root = root.resolve()
    sizes = {file: file.stat().st_size for file in files}
    if (total := sum(size for size in sizes.values() if size <= MAX_FILE_BYTES)) > MAX_CORPUS_BYTES:
        raise TrainError(f"the corpus has {total} bytes, more than {MAX_CORPUS_BYTES}; narrow --root or --glob")
    documents: dict[str, Document] = {}  # by text
    skipped: Counter[str] = Counter()
    for file in files:
        if sizes[file] > MAX_FILE_BYTES:
            skipped["too large"] += 1
            continue
        path = file.relative_to(root).as_posix()
        try:
            path.encode()  # a file name may hold bytes that are no text
            text = _read(file).expandtabs(4)  # reading has already turned \r\n and \r into \n
        except UnicodeError:
            skipped["not UTF-8"] += 1
            continue
        if not text.strip():
            skipped["empty"] += 1
        elif _is_table(text):
            skipped["table"] += 1
        elif text in documents:
            skipped["duplicate"] += 1
        else:
            documents[text] = Document(path, text)
    return list(documents.values()), skipped


def _is_table(text: str) -> bool:
    visible = "".join(text.split())
    numbers = sum(map(len, _NUMBER.findall(visible)))
    return len(text) > _SHORT and numbers > _MAX_NUMBER_SHARE * len(visible)
