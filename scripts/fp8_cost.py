"""What float8 costs: held-out cross-entropy and what the index selects, for each switch and for all, on one backend.

Run as: python scripts/fp8_cost.py --data CORPUS [--model demo] [--length 1024] [--windows 12] [--out FILE]
CORPUS is what `python -m clsa.train.data --out CORPUS` wrote. Prints a table and then one JSON line. `overlap` is the
share of the original's selection that is selected too, over the positions that see more than they select.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import clsa
from clsa.bench.report import provenance
from clsa.evaluate.held_out import Windows, cut_windows
from clsa.params import state_bytes_per_token
from clsa.train.data import load_split

KV, INDEX, WEIGHTS = {"kv_dtype": "fp8"}, {"index_dtype": "fp8"}, {"weight_dtype": "fp8"}
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "float32": ("float32", {}),
    "bfloat16": ("bfloat16", {}),
    "K and V": ("float32", KV),
    "index keys": ("float32", INDEX),
    "weights": ("float32", WEIGHTS),
    "all": ("float32", KV | INDEX | WEIGHTS),
    "all, bfloat16": ("bfloat16", KV | INDEX | WEIGHTS),
}


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Nats per token: [T, V], [T]."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(wide - top).sum(axis=-1)) + top[:, 0]
    return float(np.mean(normalizer - np.take_along_axis(wide, targets[:, None], axis=-1)[:, 0]))


def overlap(chosen: np.ndarray, original: np.ndarray) -> float:
    """Mean share of the original's selection that is chosen too: [T, K] twice."""
    full = original[:, -1] >= 0
    shares = [len(np.intersect1d(a, b)) / original.shape[1] for a, b in zip(chosen[full], original[full], strict=True)]
    return float(np.mean(shares))


def measure(windows: Windows, args: argparse.Namespace, dtype: str, switches: dict[str, str]) -> tuple[Any, ...]:
    """Bytes of weights and of state, nats per token, and the selections of each window."""
    engine = clsa.EngineConfig(max_num_seqs=1, max_tokens_in_memory=args.length, **switches)  # type: ignore[arg-type]
    llm = clsa.load(args.model, args.backend, args.device, dtype, engine=engine)
    losses = [cross_entropy(llm.logits(window[:-1]), window[1:]) for window in windows]
    selections = [llm.selection(window[:-1]) for window in windows]
    per_token = state_bytes_per_token(llm.config, dtype, llm.memory_dtypes)
    found = (llm.stats()["weight_bytes"], per_token, float(np.mean(losses)), selections)
    llm.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    windows = cut_windows(*load_split(args.data, "held_out"), args.length, args.windows)
    rows: list[dict[str, Any]] = []
    original: list[np.ndarray] = []
    for name, (dtype, switches) in VARIANTS.items():
        weight_bytes, state_bytes, loss, selections = measure(windows, args, dtype, switches)
        original = original or selections
        shared = float(np.mean([overlap(a, b) for a, b in zip(selections, original, strict=True)]))
        cost = loss / float(rows[0]["loss"]) - 1 if rows else 0.0
        rows.append({"fp8": name, "dtype": dtype, "weight_bytes": weight_bytes, "state_bytes_per_token": state_bytes})
        rows[-1] |= {"loss": loss, "cost": cost, "overlap": shared}
        print(
            f"{name:14} {weight_bytes:>12,} bytes  {state_bytes:>5,} per token  {loss:.4f} nats  {cost:+.2%}  "
            f"{shared:.1%} of the selection",
            flush=True,
        )
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = provenance() | {**settings, "windows": len(windows), "rows": rows}
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
