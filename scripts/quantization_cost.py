"""What quantised weights cost: bytes, and held-out cross-entropy against the original, on one backend.

Run as: python scripts/quantization_cost.py --data CORPUS [--model demo] [--backend mlx] [--length 1024] [--windows 64]
CORPUS is what `python -m clsa.train.data --out CORPUS` wrote. Prints a table and then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import clsa
from clsa.checkpoint import open_checkpoint
from clsa.config import Quantization
from clsa.convert import convert
from clsa.evaluate.held_out import Windows, cut_windows
from clsa.hub import resolve
from clsa.train.data import load_split


def cross_entropy(folder: Path, windows: Windows, backend: str, device: str | None) -> np.ndarray:
    """Nats per token of each window."""
    llm = clsa.load(str(folder), backend=backend, device=device, engine=clsa.EngineConfig(max_num_seqs=1))
    losses = []
    for window in windows:
        logits = llm.logits(window[:-1]).astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        normalizer = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
        losses.append(np.mean(normalizer - np.take_along_axis(logits, window[1:, None], axis=-1)[:, 0]))
    llm.close()
    return np.array(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", default="mlx")
    parser.add_argument("--device")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()
    windows = cut_windows(*load_split(args.data, "held_out"), args.length, args.windows)
    source = resolve(args.model)
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"original": source}
        for bits in (8, 4):
            folders[f"{bits}-bit"] = folder = Path(temporary) / str(bits)
            convert(source, folder, quantization=Quantization(group_size=args.group_size, bits=bits))
        for name, folder in folders.items():
            loss = float(cross_entropy(folder, windows, args.backend, args.device).mean())
            cost = loss / float(rows[0]["loss"]) - 1 if rows else 0.0
            rows.append({"weights": name, "bytes": open_checkpoint(folder).num_bytes, "loss": loss, "cost": cost})
            print(f"{name:10} {rows[-1]['bytes']:>12,} bytes  {loss:.4f} nats per token  {cost:+.2%}", flush=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    print(json.dumps({**settings, "windows": len(windows), "rows": rows}))


if __name__ == "__main__":
    main()
