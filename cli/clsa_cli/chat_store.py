"""Folders of the user, and the bounded folder of processed documents, least recently used first out."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from pathlib import Path

_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_HALF_WRITTEN = ".saving-*"  # what `write_cache` leaves if its process is killed
_STALE_SECONDS = 3600


def cache_folder() -> Path:
    """Where processed documents lie, in $XDG_CACHE_HOME or the system's place. Raises RuntimeError without a home."""
    return _base("XDG_CACHE_HOME", "Library/Caches" if sys.platform == "darwin" else ".cache") / "documents"


def history_file() -> Path:
    """Where typed lines lie, in $XDG_STATE_HOME or ~/.local/state. Raises RuntimeError without a home."""
    return _base("XDG_STATE_HOME", ".local/state") / "chat_history"


def _base(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ""))
    return (path if path.is_absolute() else Path.home() / default) / "clsa"  # the standard ignores relative ones


class DocumentStore:
    """Cache files in a folder by the hash of what they hold, together at most `max_bytes`.

    Only files with names of this kind are counted and removed. Methods raise OSError where the system refuses.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def path(self, key: str) -> Path:
        """The file of 64 hex digits, whether it is there or not."""
        return self.folder / f"{key}.safetensors"

    def touch(self, path: Path) -> None:
        """Note that a file was used now."""
        with contextlib.suppress(OSError):  # of a folder that may only be read
            os.utime(path)

    def make_room(self, path: Path, num_bytes: int) -> bool:
        """Remove others until `path` may have so many bytes. False, and nothing is removed, if it never may."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()
        if num_bytes > self.max_bytes:
            return False
        others = sorted((f for f in self._files() if f[2] != path), key=lambda file: file[0])
        excess = sum(size for _, size, _ in others) + num_bytes - self.max_bytes
        for _, size, other in others:
            if excess <= 0:
                break
            other.unlink(missing_ok=True)
            excess -= size
        return True

    def _files(self) -> list[tuple[int, int, Path]]:
        """Time of last use, bytes and path of what is there."""
        found = []
        for path in self.folder.iterdir():
            if _NAME.fullmatch(path.name) and path.is_file():
                with contextlib.suppress(FileNotFoundError):  # another process made room
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, path))
        return found

    def _sweep(self) -> None:
        for path in self.folder.glob(_HALF_WRITTEN):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
