"""Layers of a 4B decode step with float8 weights beside 16-bit ones, at the default tiles and a few others.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_float8.py --out result.json [--rows 1,8,32]

The chains of `scripts/gpu_layers.py`: 16 sliding layers in one CUDA graph, microseconds for one of them. What is not
close to the float64 product of the same 8-bit weights is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_layers as layers
import torch

from clsa_cuda.kernels.float8_product import float8_tiles
from clsa_cuda.kernels.product import ProductTiles
from clsa_cuda.kernels.tiles import Limits, limits
from clsa_cuda.plain import float8_weight

Tiles = dict[str, ProductTiles]
SHAPES: dict[str, tuple[int, int, bool]] = layers.SHAPES


def choices(rows: int) -> dict[str, Tiles]:
    """What to try: tiles of all four products each."""
    device = limits(layers.DEVICE)
    half = replace(device, sm_count=2 * device.sm_count, shared_memory=device.shared_memory // 2 - 1024)

    def by_the_rule(part: Limits = device, block_k: int = 128, max_rows: int = 64) -> Tiles:
        return {name: float8_tiles(rows, *shape, part, block_k, max_rows) for name, shape in SHAPES.items()}

    default = by_the_rule()

    def changed(change: Callable[[ProductTiles], ProductTiles], *same: str) -> Tiles:
        return {name: t if name in same else change(t) for name, t in default.items()}

    def longer(t: ProductTiles) -> ProductTiles:
        return replace(t, block_k=256, num_stages=max(2, (t.num_stages + 1) // 2), max_registers=None)

    return {
        "default": default,
        "any number of registers": changed(lambda t: replace(t, max_registers=None)),
        "5 stages": changed(lambda t: replace(t, num_stages=min(t.num_stages, 5))),
        "7 stages": changed(lambda t: replace(t, num_stages=min(t.num_stages, 7))),
        "K of 256": changed(longer, "qkv"),
        "K of 256 in gate and up": changed(longer, "qkv", "output", "down"),
        "K of 64": by_the_rule(block_k=64),
        "80 rows": by_the_rule(max_rows=80) | {"gate": default["gate"]},
        "128 rows": by_the_rule(max_rows=128) | {"gate": default["gate"]},
        "two programs": by_the_rule(half),
    }


def quantized(count: int) -> dict[str, list[Any]]:
    return {name: [float8_weight(w) for w in ws] for name, ws in layers.weights(count).items()}


def compile_some(index: int, rows: list[int]) -> None:
    for m in rows:
        chain = layers.Chain(m, quantized(1))
        jobs = dict.fromkeys((n, tiles) for choice in choices(m).values() for n, tiles in choice.items())
        for name, tiles in list(jobs)[index :: layers.WORKERS]:
            chain.choice = layers.defaults(m) | {name: tiles}
            with contextlib.suppress(Exception):  # `measure` tells
                getattr(chain, name)(0)
        if index == 0:
            chain.gather(0)
            layers.Chain(m, layers.weights(1)).run()
    torch.cuda.synchronize()


def measure(rows: int, wide: dict[str, list[Any]], narrow: dict[str, list[Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"rows": rows, "bfloat16_us": layers.Chain(rows, wide).microseconds(), "us": {}, "tiles": {}}
    exact: Any = {n: [ws[0].values.double() * ws[0].scales.double()[:, None]] for n, ws in narrow.items()}
    chain = layers.Chain(rows, narrow)
    start, chain.w = chain.choice, exact
    want, chain.w = chain.reference(), narrow
    for name, choice in choices(rows).items():
        row["tiles"][name] = {n: str(t) for n, t in choice.items()}
        try:
            chain.choice = start | choice
            assert (error := chain.wrong(want)) < 1.5e-2, f"wrong by {error}"
            row["us"][name] = chain.microseconds()
        except Exception as error:
            row["us"][name] = f"{type(error).__name__}: {error}"[:200]
    print(f"rows {rows}: {row['bfloat16_us']:.2f} us a layer with bfloat16 weights; float8:", row["us"], flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--compile", type=int)
    args = parser.parse_args()
    rows, begin = [int(m) for m in args.rows.split(",")], time.time()
    torch.manual_seed(0)
    if args.compile is not None:
        return compile_some(args.compile, rows)
    for job in [subprocess.Popen([sys.executable, *sys.argv, "--compile", str(i)]) for i in range(layers.WORKERS)]:
        job.wait()
    wide, narrow = layers.weights(layers.LAYERS), quantized(layers.LAYERS)
    result = {"device": torch.cuda.get_device_name(), "rows": [measure(m, wide, narrow) for m in rows]}
    Path(args.out).write_text(json.dumps(result, indent=1))
    print(f"{time.time() - begin:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
