"""From a model's name to its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from clsa import hub
from clsa.errors import CheckpointError, ConfigError
from clsa.hub import resolve
from tests.core.checkpoints import folder

__all__ = ["folder"]  # a fixture


class Response:
    """What the hub's errors need of a response."""

    status_code = 503
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


def no_hub(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the hub was asked")


def test_folders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == Path("model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == folder
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")


def test_bundled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.resources, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="lacks the bundled model 'demo'"):
        resolve("demo")
    (tmp_path / "assets").mkdir()
    folder.rename(tmp_path / "assets" / "demo")
    assert resolve("demo") == tmp_path / "assets" / "demo"


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("", "a model is a bundled name, a folder or a hub id"),
        ("a\0b", "a model is a bundled name"),
        ("x" * 5000, "a model is a bundled name"),
        (None, "a model is a bundled name"),
        ("dmeo", "there is no model 'dmeo'; give a bundled name \\(demo\\)"),
        ("./gone", "there is no folder './gone'"),
        ("/gone/model", "there is no folder '/gone/model'"),
        ("a/b/c", "there is no folder 'a/b/c'"),
        ("org/name/", "there is no folder 'org/name/'"),
        ("org/na me", "there is no folder 'org/na me'"),
        ("../name", "there is no folder"),
        ("x" * 300, "cannot be read|there is no model"),
    ],
)
def test_what_is_no_model(monkeypatch: pytest.MonkeyPatch, model: Any, match: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    with pytest.raises(CheckpointError, match=match) as caught:
        resolve(model)
    assert len(str(caught.value)) < 500


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        resolve(str(folder / "config.json"))


def test_fetch_asks_for_data_only_and_for_the_config_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert (repo, local_files_only) == ("org/name", False)
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/name") == folder
    assert asked[0] == ["config.json"]
    assert not [pattern for pattern in asked[1] if not pattern.endswith((".json", ".safetensors", ".jinja"))]
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ConfigError, match="model_type must be 'clsa', got 'llama'"):
        resolve("org/name")
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (errors.GatedRepoError("x", response=Response()), "is gated; ask for access"),  # type: ignore[arg-type]
        (errors.RepositoryNotFoundError("x", response=Response()), "no public model on the hub"),  # type: ignore[arg-type]
        (errors.HfHubHTTPError("x", response=Response()), "the hub answered 503"),  # type: ignore[arg-type]
        (errors.HFValidationError("x"), "is no valid hub id"),
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached; check the network"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConnectionError("cut\nby peer"), "ConnectionError: cut\\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_may_answer(monkeypatch: pytest.MonkeyPatch, error: Exception, match: str) -> None:
    def download(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=f"'org/name' .*{match}") as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)


def test_offline_takes_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="is not in the local cache; fetch it once without offline mode"):
        resolve("org/name", offline=True)
