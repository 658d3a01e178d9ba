"""From what a user calls a model to the folder that holds it: a bundled name, a folder, or a Hugging Face id."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from clsa.checkpoint import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, read_config
from clsa.config import show
from clsa.errors import CheckpointError

BUNDLED = ("demo",)
WANTED_FILES = (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    "model*.safetensors",
    "tokenizer*.json",
    "special_tokens_map.json",
    "*.jinja",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def resolve(model: str, *, offline: bool = False) -> Path:
    """The folder of a model: a bundled name ("demo"), else a folder, else a Hugging Face id ("org/name").

    A hub model is fetched into the Hugging Face cache (config first, so that other kinds of model are refused
    before their weights are fetched), with a progress bar on stderr; `offline` takes it from the cache only.
    Raises CheckpointError, or ConfigError if the hub's config.json is not one that clsa can load.
    """
    if not isinstance(model, str) or not model.strip() or "\0" in model or len(model) > 4096:
        raise CheckpointError(f"a model is a bundled name, a folder or a hub id, got {show(model)}")
    if model in BUNDLED:
        return _bundled(model)
    try:
        path = Path(model).expanduser() if model.startswith("~") else Path(model)
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{path} is a file; give the folder that holds config.json")
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder to expand ~ to
        raise CheckpointError(f"the folder {show(model)} cannot be read: {error}") from None
    if _HUB_ID.fullmatch(model) and not model.endswith((".", "-")):
        return _fetch(model, offline)
    if "/" in model or "\\" in model or model.startswith((".", "~")):
        raise CheckpointError(f"there is no folder {show(model)}, and it is no hub id (those look like org/name)")
    raise CheckpointError(
        f"there is no model {show(model)}; give a bundled name ({', '.join(BUNDLED)}), a folder or a hub id"
    )


def _bundled(name: str) -> Path:
    folder = Path(str(resources.files("clsa"))) / "assets" / name
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"this installation lacks the bundled model {name!r} ({folder}); install clsa again")
    return folder


def _fetch(repo: str, offline: bool) -> Path:
    read_config(_snapshot(repo, offline, (CONFIG_FILE,)))
    return _snapshot(repo, offline, WANTED_FILES)


def _snapshot(repo: str, offline: bool, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    offline = offline or constants.HF_HUB_OFFLINE
    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=offline))
    except errors.GatedRepoError:
        reason = "is gated; ask for access on its page at huggingface.co and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "is no folder here and no public model on the hub; check the name, or log in if it is private"
    except errors.HFValidationError:
        reason = "is no valid hub id; those look like org/name"
    except errors.LocalEntryNotFoundError:
        reason = "is not in the local cache" + (
            "; fetch it once without offline mode" if offline else " and the hub cannot be reached; check the network"
        )
    except errors.HfHubHTTPError as error:
        reason = f"could not be fetched: the hub answered {error.response.status_code}; try again later"
    except Exception as error:  # the hub's transports each raise errors of their own
        what = (str(error).splitlines() or [""])[0][:200]
        reason = f"could not be fetched ({type(error).__name__}: {what}); check network and disk space"
    raise CheckpointError(f"{repo!r} {reason}")
