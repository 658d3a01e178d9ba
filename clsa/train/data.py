"""The corpus: source files -> documents -> train and held-out tokens -> batches.

    python -m clsa.train.data --out DIR [--root FOLDER [--glob "*.py"]] [--vocab 4096]

Without `--root` the corpus is the standard library of the Python that runs, which every machine has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clsa.config import MAX_TOKENS, check_int
from clsa.errors import ClsaError, TrainError
from clsa.train import bpe
from clsa.train.sources import Document, find_files, read_documents, stdlib_files

SPLITS = ("train", "held_out")


def build_corpus(out: Path, root: Path | None = None, glob: str = "*.py", vocab_size: int = 4096) -> dict[str, Any]:
    """Collect, split, train the tokenizer on the train side, encode, and write all of it into `out`.

    Writes the three tokenizer files, `train.safetensors` and `held_out.safetensors` (tokens U16 [n], offsets
    I64 [documents + 1]) and `corpus.json`, whose content is returned. Raises TrainError.
    """
    check_int("vocab", vocab_size, bpe.MIN_VOCAB, bpe.MAX_VOCAB, TrainError)
    files = stdlib_files() if root is None else find_files(root, glob)
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    documents, skipped = read_documents(folder, files)
    splits = {name: [d for d in documents if d.held_out == (name == "held_out")] for name in SPLITS}
    for name, part in splits.items():
        if not part:
            raise TrainError(f"{folder} gives {len(documents)} documents and none of them is {name}; use more files")
    tokenizer = bpe.train_tokenizer([d.render() for d in splits["train"]], vocab_size)
    encoded = {name: bpe.encode_documents(tokenizer, [d.render() for d in part]) for name, part in splits.items()}

    from safetensors.numpy import save_file

    try:
        out.mkdir(parents=True, exist_ok=True)
        bpe.save_tokenizer(tokenizer, out)
        for name, (tokens, offsets) in encoded.items():
            save_file({"tokens": tokens, "offsets": offsets}, out / f"{name}.safetensors")
        report = {
            "source": "the Python standard library" if root is None else glob,
            "python": platform.python_version(),
            "vocab_size": vocab_size,
            "skipped": dict(sorted(skipped.items())),
            "sha256": {f: _sha256(out / f) for f in ("tokenizer.json", *(f"{name}.safetensors" for name in SPLITS))},
            **{name: _describe(part, encoded[name][1]) for name, part in splits.items()},
        }
        (out / "corpus.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise TrainError(f"cannot write the corpus to {out}: {error.strerror}") from error
    return report


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _describe(documents: Sequence[Document], offsets: NDArray[np.int64]) -> dict[str, Any]:
    lengths = np.diff(offsets).tolist()
    sizes = [len(d.text.encode()) for d in documents]
    return {
        "documents": len(documents),
        "characters": sum(len(d.text) for d in documents),
        "bytes": sum(sizes),
        "tokens": sum(lengths),
        "files": [
            {"path": d.path, "bytes": size, "tokens": n} for d, size, n in zip(documents, sizes, lengths, strict=True)
        ],
    }


def load_split(folder: Path, name: str) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Tokens uint16 [n] and offsets int64 [documents + 1] of "train" or "held_out". Raises TrainError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / f"{name}.safetensors"
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainError(
            f"cannot read {path}: {error}; write it with python -m clsa.train.data --out {folder}"
        ) from error
    tokens, offsets = arrays.get("tokens"), arrays.get("offsets")
    if tokens is None or offsets is None or tokens.dtype != np.uint16 or offsets.dtype != np.int64:
        raise TrainError(f"{path} must hold tokens (U16) and offsets (I64); write it with python -m clsa.train.data")
    _check_offsets(tokens, offsets)
    return tokens, offsets


def _check_offsets(tokens: NDArray[np.uint16], offsets: NDArray[np.int64]) -> None:
    good = tokens.ndim == offsets.ndim == 1 and len(offsets) > 1
    if not good or offsets[0] != 0 or offsets[-1] != len(tokens) or np.any(np.diff(offsets) < 1):
        raise TrainError(f"offsets must rise from 0 to the number of tokens ({tokens.size}), by document")


class Batches(Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]):
    """Endless batches (inputs, targets), both int32 [batch, seq_len]; targets are the inputs one token later.

    Each epoch puts the documents in a new random order, one after the other, and cuts the result from a
    random phase into windows, which are dealt in random order. Windows cross document borders. What does not
    fill a window or a batch is dropped for the epoch. Everything follows from `seed` and the state. Raises
    TrainError if the tokens do not fill one batch.
    """

    def __init__(
        self, tokens: NDArray[np.uint16], offsets: NDArray[np.int64], seq_len: int, batch: int, seed: int
    ) -> None:
        _check_offsets(tokens, offsets)
        check_int("seq_len", seq_len, 1, MAX_TOKENS, TrainError)
        check_int("batch", batch, 1, 1 << 16, TrainError)
        check_int("seed", seed, 0, (1 << 63) - 1, TrainError)
        needed = seq_len * (batch + 1)  # the phase skips up to seq_len - 1, the last target is one more
        if needed > len(tokens):
            raise TrainError(
                f"a batch of {batch} windows of {seq_len} tokens needs {needed} tokens, the corpus has "
                f"{len(tokens)}; use a smaller batch or shorter windows"
            )
        self._tokens, self._offsets = tokens, offsets
        self._seq_len, self._batch = seq_len, batch
        self._fixed = {"seed": seed, "seq_len": seq_len, "batch": batch, "tokens": len(tokens)}
        self._start(epoch=0)

    def _start(self, epoch: int) -> None:
        rng = np.random.default_rng([self._fixed["seed"], epoch])
        order = rng.permutation(len(self._offsets) - 1)
        self._stream = np.concatenate([self._tokens[self._offsets[i] : self._offsets[i + 1]] for i in order])
        phase = int(rng.integers(self._seq_len))
        starts = np.arange(phase, len(self._stream) - self._seq_len, self._seq_len)  # the last target is in the stream
        windows = rng.permutation(starts)
        self._windows = windows[: len(windows) // self._batch * self._batch].reshape(-1, self._batch)
        self._epoch, self._index = epoch, 0

    def __next__(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if self._index == len(self._windows):
            self._start(self._epoch + 1)
        starts = self._windows[self._index]  # [B]
        self._index += 1
        rows = self._stream[starts[:, None] + np.arange(self._seq_len + 1)].astype(np.int32)  # [B, T + 1]
        return rows[:, :-1], rows[:, 1:]

    def state(self) -> dict[str, int]:
        """A JSON object; `restore` of it goes on with the batch that would have come next."""
        return {**self._fixed, "epoch": self._epoch, "index": self._index}

    def restore(self, state: Mapping[str, object]) -> None:
        """Go to a saved state. Raises TrainError if it was saved with other data, sizes or seed."""
        for name, value in self._fixed.items():
            if state.get(name) != value:
                raise TrainError(f"cannot resume the data: {name} was {state.get(name)!r} and is now {value}")
        epoch = check_int("data epoch", state.get("epoch"), 0, 1 << 32, TrainError)
        self._start(epoch)
        self._index = check_int("data index", state.get("index"), 0, len(self._windows), TrainError)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="clsa.train.data", description="Build a corpus and its tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--root", type=Path, help="folder of sources (default: Python's standard library)")
    parser.add_argument("--glob", help="which files of --root (default: *.py)")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens of the vocabulary (default: 4096)")
    args = parser.parse_args(argv)
    if args.glob is not None and args.root is None:
        parser.error("--glob needs --root")
    try:
        report = build_corpus(args.out, args.root, args.glob or "*.py", args.vocab)
    except ClsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = {
        name: {k: v for k, v in report[name].items() if k != "files"}
        | {
            "characters_per_token": round(report[name]["characters"] / report[name]["tokens"], 3),
            "documents_over_4096_tokens": sum(f["tokens"] > 4096 for f in report[name]["files"]),
        }
        for name in SPLITS
    }
    print(json.dumps({"out": str(args.out), "vocab_size": args.vocab, "skipped": report["skipped"]} | summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
