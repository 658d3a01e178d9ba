"""Tune a sliding layer of a 4B decode step where it runs: in a chain of 16 layers, one CUDA graph.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_layers.py --out result.json [--rows 1,8,32] [--defaults]

A layer is five launches: norm and q/k/v, window attention, output and residual, norm and gate, down and residual. Each
of the 16 has weights and a ring of its own. One choice at a time is exchanged while the others stay; what counts is the
time of the chain, in which the end of one kernel overlaps the beginning of the next. A variant whose result is wrong is
not timed.
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

from clsa.bench.report import provenance
from clsa.ops import HeadNorms, Memory, Queries, Selection, Window
from clsa_cuda.kernels.gather_attention import gather_attention
from clsa_cuda.kernels.linear import product
from clsa_cuda.kernels.product import ProductTiles, product_tiles
from clsa_cuda.kernels.ring_tiles import ring_tiles
from clsa_cuda.kernels.sliding_attention import attend_window
from clsa_cuda.kernels.tiles import AttentionTiles, attention_tiles, limits

C, F, HEADS, KV_HEADS, D, W = 2560, 7680, 20, 4, 128, 512
QKV = (HEADS + 2 * KV_HEADS) * D
LAYERS, WORKERS = 16, 15
SHAPES = {"qkv": (QKV, C, False), "output": (C, HEADS * D, False), "gate": (F, C, True), "down": (C, F, False)}
POSITION, CONTEXT, TOP_K = 131072, 32768, 2048
Choice = dict[str, Any]  # ProductTiles of each of SHAPES, AttentionTiles of "attend"
DEVICE = torch.device("cuda")
DEFAULTS = "--defaults" in sys.argv


def defaults(rows: int) -> Choice:
    device = limits(DEVICE)
    start: Choice = {}
    for name, shape in SHAPES.items():
        case = (rows, *shape, name in ("qkv", "gate"), device)
        start[name] = (ring_tiles(*case) if device.hopper else None) or product_tiles(*case)
    attend, gather = (attention_tiles(rows, KV_HEADS, keys, D, 2, device) for keys in (W, TOP_K))
    return start | {"attend": attend, "gather": gather}


def tiles_of(
    rows: int, shape: tuple[int, int, bool], room: int, block_k: int, splits: int, warps: int
) -> ProductTiles | None:
    """Even tiles for every multiprocessor, with as many stages as fit `room` KB; None: too few."""
    out_size, in_size, swiglu = shape
    each = -(-out_size * splits // 132)
    each = -(-each // -(-each // 64))
    t = ProductTiles(each, block_k, splits, 2, warps)
    width = t.block_n * (2 if swiglu else 1) + max(16, rows)
    stages = min(8, -(-in_size // block_k // splits), (room << 10) // 2 // width // block_k)
    return replace(t, num_stages=stages) if stages >= 2 else None


ROOMS = (76, 108, 150, 216)


def products(rows: int, name: str) -> list[ProductTiles]:
    splits = (1,) if SHAPES[name][2] else (1, 2, 3)
    cases = itertools.product(ROOMS[1:], (64, 128, 256), splits, (4, 8))
    return list(dict.fromkeys(t for case in cases if (t := tiles_of(rows, SHAPES[name], *case)) is not None))


def together(rows: int, start: Choice) -> list[Choice]:
    """All products at once: a kernel can start early only where the one in front leaves room."""
    found = []
    for room, splits, warps in itertools.product(ROOMS, (2, 3), (4, 8)):
        choice = dict(start)
        for name, shape in SHAPES.items():
            block_k, parts = (256, 2) if name == "qkv" else (128, 1 if shape[2] else splits)
            t = tiles_of(rows, shape, room, block_k, parts, 8 if shape[2] else warps)
            choice[name] = t or choice[name]
        found.append(choice)
    return found


def variants(rows: int, start: Choice) -> list[tuple[str, Choice]]:
    """What differs from `start` in one thing each."""
    out = [(name, start | {name: t}) for name in SHAPES for t in products(rows, name)]
    out += [("attend", start | {"attend": t}) for t in attentions(rows, W)]
    return out + [("gather", start | {"gather": t}) for t in attentions(rows, TOP_K)]


def attentions(rows: int, keys: int) -> list[AttentionTiles]:
    found = []
    for block_n, splits, stages, warps in itertools.product(
        (16, 32, 64, 128), (1, 2, 3, 4, 7, 8, 16, 32), (2, 3, 4), (4, 8)
    ):
        programs = rows * KV_HEADS * splits
        if splits * block_n > keys or not 16 <= programs <= 560 or (warps == 8) != (block_n == 128):
            continue
        blocks = keys // splits // block_n
        if stages * block_n * 512 > 160 << 10 or (stages > 2 and blocks <= stages):
            continue
        found.append(AttentionTiles(block_n, splits, warps, stages))
    return found


def compile_some(index: int, rows: list[int]) -> None:
    for m in rows:
        chain = Chain(m, weights(1))
        choices = [defaults(m), *together(m, defaults(m)), *(choice for _, choice in variants(m, defaults(m)))]
        names = ("qkv", "attend", "gather", "output", "gate", "down")
        for name, tiles in list(dict.fromkeys((n, c[n]) for c in choices for n in names))[index::WORKERS]:
            chain.choice = defaults(m) | {name: tiles}
            try:
                getattr(chain, name)(0)
            except Exception as error:
                print(name, m, tiles, str(error)[:100], flush=True)
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
        pages = CONTEXT // 64 * rows
        keys, values = (torch.randn(pages * 64, KV_HEADS, D, **new) for _ in range(2))
        self.memory = Memory(keys, values, None)
        chosen = torch.rand(rows, CONTEXT, device=DEVICE).topk(TOP_K).indices.sort().values.int()
        order = torch.randperm(pages, device=DEVICE).int().reshape(rows, -1)
        found = order.gather(1, (chosen // 64).long()) * 64 + chosen % 64
        self.selection = Selection(chosen, found, torch.full((rows,), TOP_K, dtype=torch.int32, device=DEVICE))
        self.gathers = False
        self.without: frozenset[str] = frozenset()  # launches to leave out; what they would give stays the same
        self.choice = defaults(rows)
        self.projected, self.attended, self.inner = (torch.randn(rows, n, **new) for n in (QKV, HEADS * D, F))

    def qkv(self, i: int, x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.x if x is None else x
        return product(x, self.w["qkv"][i], norm=self.norm, eps=1e-6, tiles=self.choice["qkv"])

    def output(self, i: int, x: torch.Tensor | None = None, o: torch.Tensor | None = None) -> torch.Tensor:
        x, o = self.x if x is None else x, self.attended if o is None else o
        return product(o, self.w["o"][i], residual=x, tiles=self.choice["output"])

    def gate(self, i: int, x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.x if x is None else x
        return product(x, self.w["gate up"][i], norm=self.norm, eps=1e-6, swiglu=True, tiles=self.choice["gate"])

    def down(self, i: int, x: torch.Tensor | None = None, h: torch.Tensor | None = None) -> torch.Tensor:
        x, h = self.x if x is None else x, self.inner if h is None else h
        return product(h, self.w["down"][i], residual=x, tiles=self.choice["down"])

    def attend(self, i: int, qkv: torch.Tensor | None = None) -> torch.Tensor:
        qkv = self.projected if qkv is None else qkv
        parts = qkv.split([HEADS * D, KV_HEADS * D, KV_HEADS * D], 1)
        q, k, v = (part.reshape(self.rows, -1, D) for part in parts)
        norms = HeadNorms(self.head_norm, self.head_norm, 1e-6, 1e4)
        o, _ = attend_window(
            q, k, v, norms, self.windows[i], self.queries, self.mapping, self.choice["attend"], fresh=False
        )
        return o.reshape(self.rows, -1)

    def gather(self, i: int, q: torch.Tensor | None = None) -> torch.Tensor:
        q = self.attended if q is None else q[:, : HEADS * D]
        tiles = self.choice["gather"]
        return gather_attention(
            q.reshape(self.rows, HEADS, D), self.memory, self.selection, tiles, fresh=False
        ).reshape(self.rows, -1)

    def run(self) -> None:
        """Sliding layers, or layers that read a selection (with q/k/v products, of which they need q alone)."""
        x = self.x
        attend = self.gather if self.gathers else self.attend
        for i in range(len(self.windows)):
            q = None if "qkv" in self.without else self.qkv(i, x)
            o = None if "attend" in self.without else attend(i, q)
            x = x if "output" in self.without else self.output(i, x, o)
            h = None if "gate" in self.without else self.gate(i, x)
            x = x if "down" in self.without else self.down(i, x, h)

    def wrong(self, want: dict[str, torch.Tensor]) -> float:
        got = {name: getattr(self, name)(0).double() for name in want}
        return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)

    def reference(self) -> dict[str, torch.Tensor]:
        """By float64 products; attention by the default tiles, which the tests hold against the specification."""
        w = {name: ws[0].double() for name, ws in self.w.items()}
        rms = lambda x: torch.nn.functional.rms_norm(x, (C,), self.norm.double(), 1e-6)  # noqa: E731
        x, o, h = self.x.double(), self.attended.double(), self.inner.double()
        gate, up = (rms(x) @ w["gate up"].T).chunk(2, 1)
        return {
            "qkv": rms(x) @ w["qkv"].T,
            "attend": self.attend(0).double(),
            "gather": self.gather(0).double(),
            "output": x + o @ w["o"].T,
            "gate": torch.nn.functional.silu(gate) * up,
            "down": x + h @ w["down"].T,
        }

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


PARTS = {
    "products": ("qkv", "output", "gate", "down"),
    "qkv and output": ("qkv", "output"),
    "gate": ("gate",),
    "down": ("down",),
    "attention": ("attend",),
}


def parts(chain: Chain) -> dict[str, float]:
    """Microseconds a layer of chains that have a part of the launches."""
    found = {}
    for name, kept in PARTS.items():
        chain.without = frozenset({*SHAPES, "attend"} - {*kept})
        found[name] = chain.microseconds()
    chain.without = frozenset()
    return found


def tune(chain: Chain) -> dict[str, Any]:
    start = chain.choice
    want = chain.reference()
    row: dict[str, Any] = {"rows": chain.rows, "wrong": chain.wrong(want), "errors": []}
    best = {}
    for chain.gathers in (True, False):
        best[chain.gathers] = chain.microseconds()
    row["default_us"] = [best[False], best[True]]
    row["parts_us"] = parts(chain)
    print(f"rows {chain.rows}: {best[False]:.2f} us a sliding layer, {best[True]:.2f} us one that gathers", flush=True)

    def us_of(name: str, choice: Choice) -> float:
        try:
            chain.choice = choice
            assert (error := chain.wrong(want)) < 1.5e-2, f"wrong by {error}"
            chain.gathers = name == "gather"
            return chain.microseconds()
        except Exception as error:
            row["errors"].append(f"{name} {choice}: {type(error).__name__}: {error}"[:300])
            return float("inf")

    if DEFAULTS:
        return row
    found = sorted(((us_of("all", choice), choice) for choice in together(chain.rows, start)), key=lambda pair: pair[0])
    row["together"] = [(us, str({n: choice[n] for n in SHAPES})) for us, choice in found]
    for us, choice in found[:4]:
        print(f"    together {us:7.2f}", {n: choice[n] for n in SHAPES}, flush=True)
    if found[0][0] < best[False]:
        best[False], start = found[0]
    timed: dict[str, list[tuple[float, Choice]]] = {}
    for name, choice in variants(chain.rows, start):
        timed.setdefault(name, []).append((us_of(name, choice), choice))
    chosen = dict(start)
    for name, found in timed.items():
        found.sort(key=lambda pair: pair[0])
        for us, choice in found[:3]:
            print(f"    {name:9s} {us:7.2f} {choice[name]}", flush=True)
        for _, choice in found[:3]:  # what was best beside the start may not be beside the others
            chain.choice, chain.gathers = chosen | {name: choice[name]}, name == "gather"
            us = chain.microseconds()
            if us < best[chain.gathers] - 0.05:
                best[chain.gathers], chosen = us, dict(chain.choice)
        row.setdefault("tried", {})[name] = [(us, str(choice[name])) for us, choice in found]
    chain.choice = chosen
    for chain.gathers in (True, False):
        best[chain.gathers] = chain.microseconds()
    row["best_us"] = [best[False], best[True]]
    row["tiles"] = {name: asdict(choice) for name, choice in chosen.items()}
    print(
        f"  best {best[False]:.2f}, {best[True]:.2f}: {chosen}",
        len(row["errors"]),
        "errors",
        row["errors"][:2],
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--compile", type=int)
    parser.add_argument("--defaults", action="store_true", help="time the default tiles only")
    args = parser.parse_args()
    rows = [int(m) for m in args.rows.split(",")]
    torch.manual_seed(0)
    if args.compile is not None:
        return compile_some(args.compile, rows)
    begin = time.time()
    workers = range(0 if DEFAULTS else WORKERS)
    jobs = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--compile", str(i)]) for i in workers]
    for job in jobs:
        job.wait()
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    shared = weights(LAYERS)
    result = []
    for m in rows:
        result.append(tune(Chain(m, shared)))
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(provenance() | {"device": torch.cuda.get_device_name(), "rows": result}, file, indent=1)
    print(f"{time.time() - begin:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
