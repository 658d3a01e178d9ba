"""Tune a sliding layer of a 4B decode step where it runs: in a chain of 16 layers, one CUDA graph.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_layers.py --out result.json [--rows 1,8,32]

A layer is three launches: norm and q/k/v, window attention, and the rest (`close_layer`); each of the 16 has weights
and a ring of its own. One choice at a time is exchanged while the others stay; what counts is the time of the chain, in which
the end of one kernel overlaps the beginning of the next. A variant whose result is wrong is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import torch

from clsa.ops import HeadNorms, Queries, Window
from clsa_cuda.kernels.close_layer import LayerTiles, close_layer, layer_tiles
from clsa_cuda.kernels.linear import product
from clsa_cuda.kernels.product import ProductTiles, product_tiles
from clsa_cuda.kernels.sliding_attention import attend_window
from clsa_cuda.kernels.tiles import AttentionTiles, attention_tiles, limits

C, F, HEADS, KV_HEADS, D, W = 2560, 7680, 20, 4, 128, 512
QKV = (HEADS + 2 * KV_HEADS) * D
LAYERS, WORKERS = 16, 15
POSITION = 131072
Choice = dict[str, Any]  # "qkv": (ProductTiles, warps), "attend": AttentionTiles, "layer": LayerTiles
DEVICE = torch.device("cuda")


def defaults(rows: int) -> Choice:
    device = limits(DEVICE)
    return {
        "qkv": (product_tiles(rows, QKV, C, False, device), 4),
        "attend": attention_tiles(rows, KV_HEADS, W, D, 2, device),
        "layer": layer_tiles(rows, HEADS * D, C, F, device),
    }


def products(rows: int, out_size: int, in_size: int, swiglu: bool, programs: int) -> list[ProductTiles]:
    found = []
    parts = 2 if swiglu else 1
    for splits, block_k, room in itertools.product((1, 2, 4), (128, 256), (72 << 10, 108 << 10, 160 << 10)):
        if in_size // splits < 2 * block_k or (splits > 1 and swiglu and rows < 32):
            continue
        each = -(-out_size * splits // programs)
        each = -(-each // -(-each // 64))
        t = ProductTiles(each, block_k, splits, 2, 0)
        stage = (t.block_n * parts + max(16, rows)) * block_k * 2
        stages = min(8, room // stage)
        if stages >= 2:
            found.append(replace(t, num_stages=stages, prefetch=stages))
    return list(dict.fromkeys(found))


def variants(rows: int, start: Choice) -> list[tuple[str, Choice]]:
    """What differs from `start` in one thing each."""
    layer: LayerTiles = start["layer"]
    out: list[tuple[str, Choice]] = []
    for programs, warps in itertools.product((132, 264), (4, 8)):
        for t in products(rows, QKV, C, False, programs):
            out += [("qkv", start | {"qkv": (t, warps)})]
    for block_n, splits, stages, pack in itertools.product((16, 32, 64), (1, 2, 4, 8, 16, 32), (2, 3, 4), (1, 2, 4)):
        programs = rows * KV_HEADS // pack * splits
        if (
            splits * block_n <= 512
            and 24 <= programs <= 600
            and block_n * pack <= 128
            and stages * block_n * pack * 512 <= 160 << 10
        ):
            if stages > 2 and splits * block_n == 512:
                continue
            out.append(("attend", start | {"attend": AttentionTiles(block_n, splits, 4, stages, pack)}))
    shapes = {"output": (C, HEADS * D, False), "gate": (F, C, True), "down": (C, F, False)}
    for name, shape in shapes.items():
        out += [(name, start | {"layer": replace(layer, **{name: t})}) for t in products(rows, *shape, 132)]
    for ahead in (0, 2, 4, 8, 16):
        names = ("output", "gate", "down")
        changed = {name: replace(getattr(layer, name), prefetch=ahead) for name in names}
        out.append(("prefetch", start | {"layer": replace(layer, **changed)}))
    out.append(("warps", start | {"layer": replace(layer, num_warps=8)}))
    return out


def compile_some(index: int, rows: list[int]) -> None:
    for m in rows:
        chain = Chain(m, weights(1))
        seen: set[Any] = set()
        for _, choice in [("", defaults(m)), *variants(m, defaults(m))][index::WORKERS]:
            for name in ("qkv", "attend", "layer"):
                if choice[name] not in seen and (index == 0 or choice[name] != defaults(m)[name]):
                    seen.add(choice[name])
                    chain.choice = defaults(m) | {name: choice[name]}
                    try:
                        getattr(chain, name)(0)
                    except Exception as error:
                        print(name, m, choice[name], str(error)[:100], flush=True)
    torch.cuda.synchronize()


def weights(layers: int) -> dict[str, list[torch.Tensor]]:
    shapes = {"qkv": (QKV, C), "o": (C, HEADS * D), "gate up": (2 * F, C), "down": (C, F)}
    new: Any = {"device": DEVICE, "dtype": torch.bfloat16}
    return {name: [torch.randn(n, k, **new) * k**-0.5 for _ in range(layers)] for name, (n, k) in shapes.items()}


class Chain:
    def __init__(self, rows: int, w: dict[str, list[torch.Tensor]]) -> None:
        self.rows, self.w = rows, w
        new: Any = {"device": DEVICE, "dtype": torch.bfloat16}
        self.x, self.norm, self.head_norm = torch.randn(rows, C, **new), torch.rand(C, **new), torch.rand(D, **new)
        ring = (rows * W + 64, KV_HEADS, D)
        self.windows = [Window(torch.randn(ring, **new), torch.randn(ring, **new), W) for _ in w["qkv"]]
        i = torch.arange(rows, dtype=torch.int32, device=DEVICE)
        self.queries = Queries(i * 0 + POSITION, i, i[:, None], i, tuple(range(rows + 1)), (POSITION + 1,) * rows)
        self.mapping = i * W + POSITION % W
        self.choice = defaults(rows)
        self.projected, self.attended = torch.randn(rows, QKV, **new), torch.randn(rows, HEADS * D, **new)

    def qkv(self, i: int, x: torch.Tensor | None = None) -> torch.Tensor:
        tiles, warps = self.choice["qkv"]
        x = self.x if x is None else x
        return product(x, self.w["qkv"][i], norm=self.norm, eps=1e-6, tiles=tiles, num_warps=warps)

    def attend(self, i: int, qkv: torch.Tensor | None = None) -> torch.Tensor:
        qkv = self.projected if qkv is None else qkv
        parts = qkv.split([HEADS * D, KV_HEADS * D, KV_HEADS * D], 1)
        q, k, v = (part.reshape(self.rows, -1, D) for part in parts)
        norms = HeadNorms(self.head_norm, self.head_norm, 1e-6, 1e4)
        o, _ = attend_window(q, k, v, norms, self.windows[i], self.queries, self.mapping, self.choice["attend"])
        return o.reshape(self.rows, -1)

    def layer(self, i: int, x: torch.Tensor | None = None, o: torch.Tensor | None = None) -> torch.Tensor:
        x, o = self.x if x is None else x, self.attended if o is None else o
        w = {name: ws[i] for name, ws in self.w.items()}
        return close_layer(x, o, w["o"], self.norm, 1e-6, w["gate up"], w["down"], self.choice["layer"])

    def run(self) -> None:
        x = self.x
        for i in range(len(self.windows)):
            x = self.layer(i, x, self.attend(i, self.qkv(i, x)))

    def wrong(self, want: dict[str, torch.Tensor]) -> float:
        got = {name: getattr(self, name)(0).double() for name in want}
        return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)

    def reference(self) -> dict[str, torch.Tensor]:
        """By float64 products; attention by the default tiles, which the tests hold against the specification."""
        w = {name: ws[0].double() for name, ws in self.w.items()}
        rms = lambda x: torch.nn.functional.rms_norm(x, (C,), self.norm.double(), 1e-6)  # noqa: E731
        x = self.x.double() + self.attended.double() @ w["o"].T
        gate, up = (rms(x) @ w["gate up"].T).chunk(2, 1)
        layer = x + (torch.nn.functional.silu(gate) * up) @ w["down"].T
        return {"qkv": rms(self.x.double()) @ w["qkv"].T, "attend": self.attend(0).double(), "layer": layer}

    def microseconds(self) -> float:
        """Of one layer."""
        with torch.cuda.stream(torch.cuda.Stream()):
            self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        times = []
        for _ in range(11):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / LAYERS * 1e3)
        return statistics.median(times)


def tune(chain: Chain) -> dict[str, Any]:
    start = chain.choice
    want = chain.reference()
    row: dict[str, Any] = {"rows": chain.rows, "wrong": chain.wrong(want), "errors": []}
    row["default_us"] = best = chain.microseconds()
    print(f"rows {chain.rows}: {best:.2f} us a layer by default, error {row['wrong']:.4f}", flush=True)
    timed: dict[str, list[tuple[float, Choice]]] = {}
    for name, choice in variants(chain.rows, start):
        try:
            chain.choice = choice
            assert (error := chain.wrong(want)) < 1.5e-2, f"wrong by {error}"
            timed.setdefault(name, []).append((chain.microseconds(), choice))
        except Exception as error:
            row["errors"].append(f"{name} {choice}: {type(error).__name__}: {error}"[:300])
    chosen = dict(start)
    for name, found in timed.items():
        found.sort(key=lambda pair: pair[0])
        for us, choice in found[:3]:
            what = {"qkv": choice["qkv"], "attend": choice["attend"]}.get(name) or getattr(
                choice["layer"], name, choice["layer"].num_warps
            )
            print(
                f"    {name:9s} {us:7.2f} {what if name != 'prefetch' else choice['layer'].gate.prefetch}", flush=True
            )
        for us, choice in found[:3]:
            key = name if name in start else "layer"
            if key == "layer":
                part = {"warps": "num_warps"}.get(name, name)
                if name == "prefetch":
                    changed = {
                        n: replace(getattr(chosen["layer"], n), prefetch=choice["layer"].gate.prefetch)
                        for n in ("output", "gate", "down")
                    }
                else:
                    changed = {part: getattr(choice["layer"], part)}
                trial = chosen | {"layer": replace(chosen["layer"], **changed)}
            else:
                trial = chosen | {key: choice[key]}
            try:
                chain.choice = trial
                assert chain.wrong(want) < 1.5e-2
                us = chain.microseconds()
            except Exception:
                continue
            if us < best - 0.05:
                best, chosen = us, trial
                break
        row.setdefault("tried", {})[name] = [(us, str(choice)) for us, choice in found[:8]]
    row["best_us"], row["best"] = best, str(chosen)
    row["tiles"] = {
        "qkv": asdict(chosen["qkv"][0]),
        "qkv_warps": chosen["qkv"][1],
        "attend": asdict(chosen["attend"]),
        "layer": asdict(chosen["layer"]),
    }
    print(f"  best {best:.2f}: {chosen}", len(row["errors"]), "errors", row["errors"][:2], flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--compile", type=int)
    args = parser.parse_args()
    rows = [int(m) for m in args.rows.split(",")]
    torch.manual_seed(0)
    if args.compile is not None:
        return compile_some(args.compile, rows)
    begin = time.time()
    jobs = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--compile", str(i)]) for i in range(WORKERS)]
    for job in jobs:
        job.wait()
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    shared = weights(LAYERS)
    result = []
    for m in rows:
        result.append(tune(Chain(m, shared)))
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": result}, file, indent=1)
    print(f"{time.time() - begin:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
