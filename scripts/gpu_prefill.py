"""Prefill on an NVIDIA GPU: check its kernels against the plain ops, time them, and time whole prompts in the engine.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_prefill.py --out result.json [--skip engine]

TFLOP/s are of the products that are needed: keys that a query sees, nothing for masked parts of a tile. Tiles are rows,
keys, warps, stages, registers; `*` are those of the program. Ends with 1 if a check failed; it is timed all the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.profiler import ProfilerActivity, profile

import clsa_cuda
from clsa.batch import SequenceChunk, pack, upload
from clsa.bench.engine import checked_step, make_engine, random_prompts
from clsa.bench.floors import prefill_flops
from clsa.bench.random_arrays import random_params
from clsa.bench.report import provenance
from clsa.bench.sizes import plan_config
from clsa.config import PAGE_SIZE, SamplingParams
from clsa.ops import Memory, Queries, Window
from clsa_cuda.kernels.causal_prefill import causal_prefill
from clsa_cuda.kernels.pick import pick
from clsa_cuda.kernels.prefill import PrefillTiles, prefill_tiles
from clsa_cuda.kernels.score_many import score_many
from clsa_cuda.kernels.select import _part, queries_per_launch, select
from clsa_cuda.kernels.sliding_prefill import sliding_prefill
from clsa_cuda.kernels.tiles import limits, select_tiles
from clsa_cuda.ops import TorchOps
from clsa_cuda.state import page_rows

DEVICE = torch.device("cuda", 0)
H, G, D, I, K, WINDOW = 20, 4, 128, 128, 2048, 512
PLAIN = TorchOps("cuda:0")
Chunks = list[tuple[int, int]]  # first position and length of each sequence's chunk
TILES = (
    *((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2)),
    *((128, 32, 8, 3, 128), (64, 64, 4, 3), (64, 32, 4, 3, 168)),
)
SCORE_SHAPES = ((128, 8, 2), (128, 8, 3), (128, 4, 3), (64, 4, 3))
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 5e-6}


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def queries_of(chunks: Chunks) -> Queries:
    """Of these chunks, on pages in random order."""
    ends = [-(-(start + length) // PAGE_SIZE) for start, length in chunks]
    order = np.random.default_rng(0).permutation(sum(ends)).astype(np.int32)
    pages = np.split(order, np.cumsum(ends)[:-1])
    parts = [
        SequenceChunk(range(length), start, own, b, "all")
        for b, ((start, length), own) in enumerate(zip(chunks, pages, strict=True))
    ]
    return upload(PLAIN, pack(parts, WINDOW).queries)


def memory_of(queries: Queries, heads: int = G, dim: int = D, dtype: torch.dtype = torch.bfloat16) -> Memory:
    rows = (int(queries.block_table.max()) + 2) * PAGE_SIZE  # the last page stands for the memory's own rows
    k, v, k_idx = (normal(rows, *shape, dtype=dtype) for shape in ((heads, dim), (heads, dim), (I,)))
    for x in (k, v, k_idx):
        x[-PAGE_SIZE:] = 0
    return Memory(k, v, k_idx)


def window_of(slots: int, size: int, heads: int = G, dim: int = D, dtype: torch.dtype = torch.bfloat16) -> Window:
    k, v = (normal(slots * size + PAGE_SIZE, heads, dim, dtype=dtype) for _ in range(2))
    k[-PAGE_SIZE:] = v[-PAGE_SIZE:] = 0
    return Window(k, v, size)


# -- checks ------------------------------------------------------------------------------------------------

MIXED: Chunks = [(700, 1), (0, 1000), (5000, 900), (0, 1), (511, 513), (64, 512), (12345, 1), (0, 511)]


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        others = ((8, 8, 64), (10, 2, 80), (4, 1, 256)) if dtype == torch.bfloat16 else ()
        for heads, kv_heads, dim in ((20, 4, 128), *others):
            case = f"{name} {heads}/{kv_heads} x {dim}"
            for size in (512, 100) if dim == D else (512,):
                yield f"sliding {case} W={size}", partial(check_sliding, heads, kv_heads, dim, dtype, size)
            yield f"causal {case}", partial(check_causal, heads, kv_heads, dim, dtype)
        for k in (64, K):
            yield f"select {name} k={k}", partial(check_select, dtype, k)
    yield "scores do not depend on the chunk", check_same_bits


def compare(got: Tensor, want: Tensor) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error < TOLERANCE[got.dtype], f"relative RMS error {error:.3g}"


def check_sliding(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, size: int) -> None:
    queries, window = queries_of(MIXED), window_of(len(MIXED), size, kv_heads, dim, dtype)
    q, k, v = (normal(queries.cu_seqlens[-1], n, dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    compare(sliding_prefill(q, k, v, window, queries), PLAIN.sliding_attention(q, k, v, window, queries))


def check_causal(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    queries = queries_of(MIXED)
    memory, q = memory_of(queries, kv_heads, dim, dtype), normal(queries.cu_seqlens[-1], heads, dim, dtype=dtype)
    compare(causal_prefill(q, memory, queries), PLAIN.dense_attention(q, memory, queries))


def check_select(dtype: torch.dtype, k: int) -> None:
    queries = queries_of(MIXED)
    memory, q_idx = memory_of(queries, 1, 16, dtype), normal(queries.cu_seqlens[-1], I, dtype=dtype)
    got, want = select(q_idx, memory, queries, k, 1), PLAIN.select(q_idx, memory, queries, k, 1)
    assert torch.equal(got.lengths, want.lengths), "lengths differ"
    table = queries.block_table[queries.sequence.long()]
    rows = page_rows(table, got.positions, got.positions >= 0, -1)
    assert torch.equal(got.rows, rows.int()), "rows are not those of the positions"
    chosen = torch.zeros(2, len(q_idx), table.shape[1] * PAGE_SIZE + 1, dtype=torch.bool, device=DEVICE)
    for mask, selection in zip(chosen, (got, want), strict=True):
        mask.scatter_(1, selection.positions.long() + 1, True)  # -1 is the first
    share = float((chosen[0] ^ chosen[1]).sum() / chosen[1].sum())
    assert share < 1e-4, f"{share:.3%} of the selection differs"


def check_same_bits() -> None:
    queries = queries_of([(0, 300), (600, 4000)])
    memory, q_idx = memory_of(queries), normal(4300, I)
    assert memory.k_idx is not None
    keys = score_many(q_idx, memory.k_idx, queries, 8)[0]
    for start, stop in ((0, 1), (17, 40), (250, 400), (301, 4300), (4299, 4300)):
        part = score_many(q_idx[start:stop], memory.k_idx, _part(queries, start, stop), 8)[0]
        for t in range(start, stop, 37):
            seen = int(queries.positions[t]) + 1
            assert torch.equal(part[t - start, :seen], keys[t, :seen]), f"rows {start} to {stop}, query {t}"


# -- kernels -----------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], Any], seconds: float = 0.15) -> float:
    """Median of as many calls as fit the time, after one that compiles and one that warms up."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(3, min(50, int(seconds / (time.perf_counter() - begin))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def pairs(chunks: Chunks, window: int | None = None) -> int:
    """Of a query and a key that it sees."""
    return sum(min(p + 1, window or p + 1) for start, length in chunks for p in range(start, start + length))


def kernel_cases() -> Iterator[tuple[str, int, Any, Callable[[], Any]]]:
    """Name, operations, tiles (None: what the program chooses), the call."""
    all_tiles = [None, *(PrefillTiles(*sizes) for sizes in TILES)]
    for name, chunks in (
        ("sliding 8K", [(0, 8192)]),
        ("sliding 4 x 2K", [(0, 2048)] * 4),
        ("sliding 8K after 4K", [(4096, 8192)]),
        ("sliding 8K and 31 decodes", [(9000, 1)] * 31 + [(4096, 8161)]),
    ):
        queries, window = queries_of(chunks), window_of(len(chunks), WINDOW)
        q, k, v = (normal(queries.cu_seqlens[-1], n, D) for n in (H, G, G))
        for tiles in all_tiles:
            run = partial(sliding_prefill, q, k, v, window, queries, tiles)
            yield name, 4 * H * D * pairs(chunks, WINDOW), tiles, run
    for context in (0, 32 << 10, 120 << 10):
        chunks, name = [(context, 8192)], f"causal 8K after {context >> 10}K"
        queries = queries_of(chunks)
        q, memory, flops = normal(8192, H, D), memory_of(queries), 4 * H * D * pairs(chunks)
        for tiles in all_tiles:
            yield name, flops, tiles, partial(causal_prefill, q, memory, queries, tiles)
        yield f"{name}, torch, contiguous", flops, None, partial(sdpa, q, memory, context + 8192)
    for context in (0, 120 << 10):
        yield from select_cases([(context, 8192)], f"8K after {context >> 10}K")


def sdpa(q: Tensor, memory: Memory, length: int) -> Tensor:
    k, v = (x[:length].transpose(0, 1)[None] for x in (memory.k, memory.v))
    bias = causal_lower_right(len(q), length)
    return F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, bias, enable_gqa=True)


def select_cases(chunks: Chunks, name: str) -> Iterator[tuple[str, int, Any, Callable[[], Any]]]:
    queries = queries_of(chunks)
    memory, q_idx, flops = memory_of(queries, 1, 16), normal(8192, I), 2 * I * pairs(chunks)
    assert memory.k_idx is not None
    pages = queries.block_table.shape[1]
    step = min(8192, queries_per_launch(pages))
    tiles, k_idx = select_tiles(step, pages, K, limits(DEVICE)), memory.k_idx
    parts = [(q_idx[a : a + step], _part(queries, a, min(a + step, 8192))) for a in range(0, 8192, step)]

    def scores(shape: tuple[int, int, int] | None) -> tuple[Tensor, Tensor]:
        return [score_many(q, k_idx, part, tiles.group, shape) for q, part in parts][-1]

    for shape in (None, *SCORE_SHAPES):
        yield f"scores {name}", flops, shape, partial(scores, shape)
    last = parts[-1][1]
    yield f"pick {name}, last {len(last.positions)}", 0, None, partial(pick, *scores(None), last, K, tiles)
    yield f"select {name}", flops, None, partial(select, q_idx, memory, queries, K, 1)


# -- engine ------------------------------------------------------------------------------------------------


def engine_rows() -> Iterator[dict[str, Any]]:
    ops, config = clsa_cuda.backend.open("cuda"), plan_config("4b", "clsa", 1 << 20)
    params = random_params(ops, config, "bfloat16")
    for count, length in ((1, 128 << 10), (64, 2 << 10)):
        pages = count * (length // PAGE_SIZE + 1)
        for chunk in (4096, 8192, 16384):
            engine = make_engine(ops, params, config, "bfloat16", pages=pages, slots=count, tokens_per_step=chunk)
            prompts = random_prompts(count, length)

            def run(engine: Any = engine, prompts: Any = prompts) -> float:
                for prompt in prompts:
                    engine.add(engine.make_request(prompt, SamplingParams(max_tokens=1, ignore_eos=True)))
                torch.cuda.synchronize()
                begin = time.perf_counter()
                while engine.has_work:
                    checked_step(engine)
                torch.cuda.synchronize()
                return time.perf_counter() - begin

            torch.cuda.reset_peak_memory_stats()
            seconds = min(run() for _ in range(3))  # the first compiles
            row = {"name": f"prefill {count} x {length >> 10}K, {chunk} a step", "ms": seconds * 1e3}
            row["tokens_per_second"] = count * length / seconds
            row["tflops"] = count * prefill_flops(config, length) / seconds / 1e12
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            if chunk == 8192:
                row["kernels"] = profiled(run)
            yield row
            del engine, run
            torch.cuda.empty_cache()


def profiled(run: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """The kernels that take most: name, ms in all, how often. The last row is all of them."""
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
    rows = [(e.key[:90], e.self_device_time_total / 1e3, e.count) for e in prof.key_averages()]
    rows.sort(key=lambda row: -row[1])
    return [*rows[:12], ("all kernels", sum(ms for _, ms, _ in rows), sum(n for *_, n in rows))]


def shown(tiles: Any) -> str:
    return " ".join(str(x) for x in (astuple(tiles) if isinstance(tiles, PrefillTiles) else tiles) if x is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--skip", default="", help="of: checks, kernels, engine")
    args = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = provenance() | {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    result |= {
        "checks": {},
        "rows": [],
        "tiles": [shown(prefill_tiles(D, 2, limits(DEVICE), window=w)) for w in (True, False)],
    }
    begin = time.perf_counter()
    for name, check in checks() if "checks" not in args.skip else ():
        try:
            check()
            result["checks"][name] = "ok"
        except Exception as error:
            result["checks"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"CHECK FAILED {name}: {result['checks'][name]}", flush=True)
    bad = sum(text != "ok" for text in result["checks"].values())
    print(f"{len(result['checks']) - bad} checks passed, {bad} failed, {time.perf_counter() - begin:.0f} s")
    for name, flops, tiles, run in kernel_cases() if "kernels" not in args.skip else ():
        row: dict[str, Any] = {"name": name, "tiles": "*" if tiles is None else shown(tiles)}
        try:
            row["ms"] = milliseconds(run)
            row["tflops"] = flops / row["ms"] / 1e9
            text = f"{row['ms']:9.3f} ms {row['tflops']:6.0f} TFLOP/s"
        except Exception as error:
            text = row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{name:36s} {text}  {row['tiles']}", flush=True)
        result["rows"].append(row)
    Path(args.out).write_text(json.dumps(result, indent=1))
    print(f"{time.perf_counter() - begin:.0f} s")
    for row in engine_rows() if "engine" not in args.skip else ():
        result["rows"].append(row)
        print(f"{row['name']:36s} {row['ms']:9.1f} ms {row['tflops']:6.0f} TFLOP/s {row['tokens_per_second']:9.0f} /s")
        for name, ms, count in row.get("kernels", []):
            print(f"    {ms:9.2f} ms {count:6d}x {name}", flush=True)
        Path(args.out).write_text(json.dumps(result, indent=1))
    print(f"{time.perf_counter() - begin:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
