"""The folder of processed documents: what is removed when room is needed, and where it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clsa_cli.chat_store import DocumentStore, cache_folder


def test_the_least_recently_used_go_first_and_nothing_else(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path, 100)
    paths = [store.path(f"{i:064x}") for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(b"x" * 30)
        os.utime(path, (i, i))
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"x" * 500)
    stale, young = tmp_path / ".saving-old", tmp_path / ".saving-new"
    for half in (stale, young):
        half.mkdir()
        (half / "x").write_text("x")
    os.utime(stale, (1, 1))
    assert not store.make_room(store.path("f" * 64), 101)
    assert all(path.exists() for path in paths), "nothing is removed for what never fits"
    store.touch(paths[0])
    assert store.make_room(store.path("f" * 64), 40)
    assert [path.exists() for path in paths] == [True, False, False, True]
    assert store.make_room(paths[0], 70), "what is replaced does not count"
    assert [path.exists() for path in paths] == [True, False, False, True]
    assert mine.exists() and young.exists() and not stale.exists()


def test_where_documents_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "clsa/documents"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() in {tmp_path / f"home/{name}/clsa/documents" for name in (".cache", "Library/Caches")}
