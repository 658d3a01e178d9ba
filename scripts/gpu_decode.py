"""Time whole decode steps of the 4B sizes on an NVIDIA GPU, as the engine runs them, and profile one.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_decode.py --out result.json [--contexts 131072] [--batches 1,8,32]

Weights and state are random; every sequence has a page table of its own in shuffled order. Besides the replayed graph
the step is timed through `Recorder` with its host work, one step ahead, as in the engine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Generator
from contextlib import closing
from typing import Any

import numpy as np
import torch

import clsa_cuda
from clsa.batch import SequenceChunk, pack
from clsa.bench.report import provenance
from clsa.config import FP8, PAGE_SIZE, MemoryDtypes, ModelConfig, SamplingParams
from clsa.model import new_state
from clsa.ops import StepInputs
from clsa.params import nest, num_parameters, state_bytes_per_token, tensor_shapes, window_bytes
from clsa.plan import make_plan
from clsa.runner import Computation
from clsa.sampling import SamplingRow, pack_sampling
from clsa.step import pad_decode
from clsa.weights import in_float8

SLIDING, CROSS, FULL = "sliding_attention", "cross_attention", "full_attention"
PLANS = {
    "clsa": ((SLIDING,) * 16 + (CROSS,) * 16, "F" + "S" * 15),
    "yoco": ((SLIDING,) * 16 + (CROSS,) * 16, "D" * 16),
    "transformer": ((FULL,) * 32, "D" * 32),
}


def config_4b(plan: str) -> ModelConfig:
    layer_types, pattern = PLANS[plan]
    return ModelConfig(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=7680,
        num_hidden_layers=32,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=128,
        layer_types=layer_types,
        index_topk_pattern=pattern,
        max_position_embeddings=1 << 20,
    )


def measured_read_bandwidth() -> float:
    x = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    times = timed(lambda: x.view(torch.int32).amax(), 10)
    return x.nbytes / statistics.median(times)


def timed(run: Any, repeats: int) -> list[float]:
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


class Bench:
    def __init__(self, plan: str, context: int, batch: int, share_pages: int, fp8: tuple[str, ...] = ()) -> None:
        """`fp8`: which of "weights", "kv" and "index" are held in 8 bits."""
        self.ops = clsa_cuda.backend.open("cuda")
        self.config, self.plan = config_4b(plan), make_plan(config_4b(plan))
        torch.manual_seed(0)
        flat = {
            name: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            .mul_(0.02 if len(shape) > 1 else 0.1)
            .add_(1.0 if len(shape) == 1 else 0.0)
            for name, shape in tensor_shapes(self.config).items()
        }
        self.fp8 = fp8
        if "weights" in fp8:
            flat = {n: self.ops.float8_weight(w) if in_float8(n, w.shape) else w for n, w in flat.items()}
        self.stored = MemoryDtypes(FP8 if "kv" in fp8 else None, FP8 if "index" in fp8 else None)
        self.params = nest(flat)
        self.pages = -(-context // PAGE_SIZE) + 1
        owners = -(-batch // share_pages)
        self.state = new_state(self.ops, self.plan, owners * self.pages * PAGE_SIZE, batch, "bfloat16", self.stored)
        for memory in self.state.memories:
            for x in (memory.k, memory.v, memory.k_idx):
                for part in () if x is None else x.split(1 << 20):
                    part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
        for window in self.state.windows:
            window.k.normal_(), window.v.normal_()
        order = np.random.default_rng(0).permutation(owners * self.pages).reshape(owners, self.pages)
        self.tables = [order[b % owners].astype(np.int32) for b in range(batch)]  # as clsa.step.PageTables keeps them
        self.batch, self.context = batch, context
        self.recorder = self.ops.record(Computation(self.ops, self.params, self.plan))

    def inputs(self, step: int) -> StepInputs:
        at = self.context + step % PAGE_SIZE
        chunks = [SequenceChunk([b + 7], at, self.tables[b], b, "last") for b in range(self.batch)]
        sampling, source = pack_sampling([SamplingRow(SamplingParams(), at + 1, ()) for _ in range(self.batch)])
        return pad_decode(StepInputs(pack(chunks, self.config.sliding_window), sampling, None, source), self.pages)

    def step(self, i: int, previous: Any) -> Any:
        sampled, self.state = self.recorder(self.inputs(i), previous, self.state)
        return sampled.tokens, self.ops.fetch([sampled.tokens])

    def arrivals(self) -> Generator[float]:
        """When the tokens of each step were on the host, without end; one step ahead, as in the engine.

        The device waits for the first step, so what comes before the first arrival is not the time of a step.
        """
        previous, waiting = self.step(0, None)
        try:
            for i in itertools.count(1):
                previous, wait = self.step(i, previous)
                waiting()
                waiting = wait
                yield time.perf_counter()
        finally:
            (tokens,) = waiting()
            assert ((tokens >= 0) & (tokens < self.config.vocab_size)).all(), tokens

    def run(self, steps: int) -> dict[str, Any]:
        for i in range(3):
            _, wait = self.step(i, None)
        wait()
        graph = next(g for g in self.recorder._graphs.values() if g.graph is not None)
        replays = timed(graph.graph.replay, steps)
        with closing(self.arrivals()) as arrivals:
            times = list(itertools.islice(arrivals, steps + 1))
        engine_step = (times[-1] - times[0]) / steps
        return {"graph_ms": statistics.median(replays) * 1e3, "engine_step_ms": engine_step * 1e3}

    def profile(self) -> list[tuple[str, float, int]]:
        from torch.profiler import ProfilerActivity, profile

        graph = next(g for g in self.recorder._graphs.values() if g.graph is not None)
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            for _ in range(3):
                graph.graph.replay()
            torch.cuda.synchronize()
        rows = [(e.key[:90], e.self_device_time_total / 3e3, e.count // 3) for e in prof.key_averages()]
        return sorted(rows, key=lambda row: -row[1])

    def floor_bytes(self) -> int:
        c = self.config
        head = c.vocab_size * c.hidden_size * 2
        weights = head + (num_parameters(c) - c.vocab_size * c.hidden_size * 2) * (1 if "weights" in self.fp8 else 2)
        per_token = state_bytes_per_token(c, "bfloat16", self.stored)
        if "F" in c.index_topk_pattern:
            row = 2 * c.num_key_value_heads * c.head_dim * (1 if "kv" in self.fp8 else 2)
            rows = min(c.index_topk, self.context) * row * len(c.index_topk_pattern)
            read = self.context * c.index_head_dim * (1 if "index" in self.fp8 else 2) + rows
        elif self.plan.num_memories == 1:
            read = self.context * per_token * len(c.index_topk_pattern)
        else:
            read = self.context * per_token
        return weights + self.batch * (read + window_bytes(c, "bfloat16"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--contexts", default="131072")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--plans", default="clsa")
    parser.add_argument("--share-pages", type=int, default=1, help="sequences that alias one page table (Transformer)")
    parser.add_argument("--fp8", default="", help='what is held in 8 bits, cases with commas: ",weights,weights+kv"')
    args = parser.parse_args()
    bandwidth = measured_read_bandwidth()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "read_bandwidth": bandwidth, "rows": []}
    for plan in args.plans.split(","):
        for context in map(int, args.contexts.split(",")):
            for batch, case in itertools.product(map(int, args.batches.split(",")), args.fp8.split(",")):
                try:
                    fp8 = tuple(filter(None, case.split("+")))
                    bench = Bench(plan, context, batch, args.share_pages if plan == "transformer" else 1, fp8)
                    row = {"plan": plan, "context": context, "batch": batch, "fp8": case, **bench.run(20)}
                    row["floor_ms"] = bench.floor_bytes() / bandwidth * 1e3
                    row["kernels"] = bench.profile()[:24]
                except Exception as error:
                    row = {
                        "plan": plan,
                        "context": context,
                        "batch": batch,
                        "fp8": case,
                        "error": f"{type(error).__name__}: {error}"[:600],
                    }
                result["rows"].append(row)
                print({k: v for k, v in row.items() if k != "kernels"}, flush=True)
                for name, ms, count in row.get("kernels", [])[:14]:
                    print(f"    {ms:8.4f} ms {count:4d}x {name}", flush=True)
                bench = None
                torch.cuda.empty_cache()
                with open(args.out, "w", encoding="utf-8") as file:
                    json.dump(provenance() | result, file, indent=1)  # versions of what was loaded


if __name__ == "__main__":
    main()
