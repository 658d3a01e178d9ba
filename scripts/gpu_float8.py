"""Layers of a 4B decode step with float8 weights beside 16-bit ones, at the default tiles and a few others.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_float8.py --out result.json [--rows 1,8,32]

The chains of `scripts/gpu_layers.py`: 16 sliding layers in one CUDA graph, microseconds for one of them. What is not
close to the float64 product of the same 8-bit weights is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_layers as layers
import torch

from clsa.bench.report import provenance
from clsa_cuda.kernels.float8_product import float8_tiles
from clsa_cuda.kernels.product import ProductTiles
from clsa_cuda.kernels.ring_tiles import RingTiles, block_of_rows, ring_bytes, ring_tiles
from clsa_cuda.kernels.tiles import limits
from clsa_cuda.plain import float8_weight

Tiles = dict[str, ProductTiles | RingTiles]
SHAPES: dict[str, tuple[int, int, bool]] = layers.SHAPES
NORMED = ("qkv", "gate")


def choices(rows: int) -> dict[str, Tiles]:
    """What to try: tiles of all four products each."""
    device = limits(layers.DEVICE)
    found: dict[str, Tiles] = {"no ring": {n: float8_tiles(rows, *shape, device) for n, shape in SHAPES.items()}}
    default = {n: ring_tiles(rows, *shape, n in NORMED, device, 1) for n, shape in SHAPES.items()}
    if any(t is None for t in default.values()):
        return found
    found["default"] = {n: t for n, t in default.items() if t is not None}
    for room, block_k in itertools.product((112, 150, 220), (128, 256)):
        found[f"{room} KB, K of {block_k}"] = {
            n: cut_to(t, rows, n, room << 10, block_k) for n, t in found["default"].items()
        }
    for name, block_k in itertools.product(SHAPES, (128, 256)):
        cut = cut_to(found["default"][name], rows, name, 220 << 10, block_k)
        found[f"{name} with K of {block_k}"] = found["default"] | {name: cut}
    return found


def cut_to(tiles: Any, rows: int, name: str, room: int, block_k: int) -> RingTiles:
    """The same rows and parts, in so many bytes of shared memory."""
    _, in_size, swiglu = SHAPES[name]
    block_m = block_of_rows(rows)
    stage = ring_bytes(block_m, block_k, swiglu, name in NORMED, 1)
    turns = -(-in_size // block_k // tiles.splits)
    return RingTiles(tiles.rows, block_k, tiles.splits, max(2, min(12, turns, (room - 2 * block_m * block_k) // stage)))


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
    result = provenance() | {"device": torch.cuda.get_device_name()}
    result |= {"rows": [measure(m, wide, narrow) for m in rows]}
    Path(args.out).write_text(json.dumps(result, indent=1))
    print(f"{time.time() - begin:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
