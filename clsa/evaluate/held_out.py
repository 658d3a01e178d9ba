"""Held-out cross-entropy at given context lengths, with and without the selection, and the selection's coverage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clsa.checkpoint import open_checkpoint
from clsa.config import MAX_TOKENS, ModelConfig, check_int
from clsa.errors import RequestError, TrainError
from clsa.train.data import load_split
from clsa.train.trainer import Forward, Trainer, make_forward
from clsa.weights import dense_weights

Windows = NDArray[np.int32]  # [n, length + 1]: inputs, and targets one token later


def evaluate(
    models: Sequence[Path],
    *,
    data: Path,
    lengths: Sequence[int],
    trainer: Trainer,
    batch_tokens: int = 8192,
    max_windows: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Score checkpoints on the same windows of the held-out documents of a corpus (`clsa.train.data`).

    Args: a window of each length lies inside one document and overlaps no other; `max_windows` takes only so many,
    spread evenly over the documents. `batch_tokens` are scored at once (at least one window; memory grows with
    batch_tokens * length).

    Returns one row per model and length: `model`, `pattern`, `length`, `windows`, `tokens` (scored), and for "dense"
    (every layer attends to everything) and, where the model has an index, "sparse" (as the checkpoint is meant):
    `loss` (nats per token), and with an index also `coverage` (share of the dense attention mass that the selection
    holds, mean over positions) and `coverage_from_k` (only positions that see more than `index_topk` tokens; None if
    there are none). In both cases the attention mass is that of the run itself.

    Raises RequestError on bad lengths, TrainError on data that does not fit.
    """
    if not lengths:
        raise RequestError("lengths must name at least one context length, such as 1024")
    for length in lengths:
        check_int("length", length, 1, MAX_TOKENS, RequestError)
    check_int("batch_tokens", batch_tokens, 1, 1 << 30, RequestError)
    if max_windows is not None:
        check_int("max_windows", max_windows, 1, 1 << 30, RequestError)
    tokens, offsets = load_split(data, "held_out")
    windows = {length: cut_windows(tokens, offsets, length, max_windows) for length in lengths}
    rows: list[dict[str, Any]] = []
    for folder in models:
        checkpoint = open_checkpoint(folder)
        _check_fit(checkpoint.config, folder, tokens, lengths)
        trainer.load({name: np.asarray(array, np.float32) for name, array in dense_weights(checkpoint)})
        for length in lengths:
            report(f"{folder}: {len(windows[length])} windows of {length} tokens")
            scores = _score(trainer, checkpoint.config, windows[length], batch_tokens)
            rows.append({"model": str(folder), "pattern": checkpoint.config.index_topk_pattern} | scores)
    return rows


def cut_windows(
    tokens: NDArray[np.uint16], offsets: NDArray[np.int64], length: int, limit: int | None = None
) -> Windows:
    """All windows of `length` tokens and their targets that lie inside a document and do not overlap; at most `limit`.

    Raises TrainError if no document is long enough.
    """
    starts = np.concatenate([np.arange(first, last - length, length) for first, last in pairwise(offsets)])
    if len(starts) == 0:
        longest = int(np.diff(offsets).max())
        raise TrainError(f"no held-out document has the {length + 1} tokens of a window; the longest has {longest}")
    if limit is not None and limit < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, limit).round().astype(np.int64)]
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def _check_fit(config: ModelConfig, folder: Path, tokens: NDArray[np.uint16], lengths: Sequence[int]) -> None:
    if int(tokens.max()) >= config.vocab_size:
        raise TrainError(
            f"the held-out text has token {int(tokens.max())}, beyond the vocab_size {config.vocab_size} of {folder}; "
            f"give the corpus that the model was trained with"
        )
    if max(lengths) > config.max_position_embeddings:
        raise RequestError(
            f"length {max(lengths)} is more than the max_position_embeddings ({config.max_position_embeddings}) of "
            f"{folder}"
        )


def _score(trainer: Trainer, config: ModelConfig, windows: Windows, batch_tokens: int) -> dict[str, Any]:
    length = windows.shape[1] - 1
    forward = make_forward(config)
    modes = ("dense", "sparse") if "F" in config.index_topk_pattern else ("dense",)
    scores = {
        mode: _score_mode(
            trainer, forward, windows, max(1, batch_tokens // length), config.index_topk, mode == "sparse"
        )
        for mode in modes
    }
    return {"length": length, "windows": len(windows), "tokens": len(windows) * length} | scores


def _score_mode(
    trainer: Trainer, forward: Forward, windows: Windows, batch: int, k: int, sparse: bool
) -> dict[str, float | None]:
    loss, covered = 0.0, np.zeros(windows.shape[1] - 1)  # sums over windows; covered per position
    has_index = False
    for i in range(0, len(windows), batch):
        part = windows[i : i + batch]
        cross_entropy, coverage = trainer.score(forward, part[:, :-1], part[:, 1:], sparse=sparse)
        loss += float(cross_entropy.sum(dtype=np.float64))
        if coverage is not None:
            has_index = True
            covered += coverage.sum(axis=0, dtype=np.float64)
    result: dict[str, float | None] = {"loss": loss / (len(windows) * len(covered))}
    if has_index:
        covered /= len(windows)
        result["coverage"] = float(covered.mean())
        result["coverage_from_k"] = float(covered[k:].mean()) if k < len(covered) else None
    return result
