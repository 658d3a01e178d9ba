"""Times of `gpu_check.py`: each CUDA kernel in a CUDA graph, on rotated inputs, beside its floor and torch."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries, Selection, Window
from clsa_cuda.kernels import dense_attention, gather_attention, select, sliding_attention, write_memory
from clsa_cuda.kernels import tiles as sizes
from clsa_cuda.kernels.tiles import AttentionTiles, ContextTiles, attention_tiles, context_tiles, limits, select_tiles

DEVICE = torch.device("cuda", 0)
CONTEXT, SEQUENCES, K, WINDOW = 1 << 17, 32, 2048, 512
H, G, D, I = 20, 4, 128, 128
ROW = 2 * G * D * 2  # bytes of K and V of one token
LAYERS = 16  # that share a selection
Call = Callable[[], Any]


class Data:
    """What the kernels read: 32 sequences of 128K tokens. A `small` one has the same shapes on one sequence's pages."""

    def __init__(self, small: bool = False) -> None:
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        self.num_pages = CONTEXT // PAGE_SIZE * (1 if small else SEQUENCES)
        rows = self.num_pages * PAGE_SIZE
        self.k_idx = self.normal(rows, I)
        self.memory = Memory(self.normal(rows, G, D), self.normal(rows, G, D), self.k_idx)
        order = torch.arange(SEQUENCES * CONTEXT // PAGE_SIZE, device=DEVICE) % self.num_pages
        if not small:
            order = torch.randperm(self.num_pages, generator=self.generator, device=DEVICE)
        self.table = order.int().view(SEQUENCES, -1)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=DEVICE, dtype=torch.bfloat16)

    def queries(self, batch: int, length: int = CONTEXT, first: int = 0) -> Queries:
        """A decode step of `batch` sequences of `length` tokens."""
        sequence = torch.arange(batch, dtype=torch.int32, device=DEVICE)
        positions = torch.full((batch,), length - 1, dtype=torch.int32, device=DEVICE)
        table = self.table[first : first + batch]
        if length != CONTEXT:
            table = self.table.view(-1)[: batch * length // PAGE_SIZE].view(batch, -1)
        return Queries(positions, sequence, table, sequence, tuple(range(batch + 1)), (length,) * batch)

    def selections(self, batch: int, count: int) -> list[Selection]:
        out = []
        lengths = torch.full((batch,), K, dtype=torch.int32, device=DEVICE)
        for _ in range(count):
            rows = torch.randint(self.k_idx.shape[0], (batch, K), generator=self.generator, device=DEVICE)
            rows = rows.sort(1).values.int()
            out.append(Selection(rows, rows, lengths))
        return out

    def sets(self, batch: int) -> range:
        """First sequences of disjoint batches."""
        return range(0, SEQUENCES, batch)


@dataclass
class Case:
    """One line of the table. `build` gives the calls of one graph; their mean is the time."""

    name: str
    kernel: str  # whose check must have passed; "torch" for torch's own
    bytes: int
    target: float | None
    build: Callable[[Data], list[Call]]
    tiles: Any = None
    tuned: bool = False
    reference: Callable[[Data], list[Call]] | None = None  # what a tuned case's first call must agree with
    early: bool = True  # whether kernels may be launched before their predecessor has ended


# -- cases -------------------------------------------------------------------------------------------------


def cases(tune: bool) -> Iterator[Case]:
    for batch, target in ((1, 0.030), (8, None), (32, 0.300)):
        yield from select_cases(batch, CONTEXT, target)
    yield from select_cases(32, 8192, None)
    yield from select_cases(1, 1 << 20, None)
    for batch, target in ((1, 0.010), (8, 0.018), (32, 0.040)):
        yield from gather_cases(batch, target)
    for batch in (1, 8, 32):
        yield from dense_cases(batch)
        yield from sliding_cases(batch)
    yield from uneven_cases()
    for batch in (1, 32):
        yield from write_cases(batch)
    if tune:
        import gpu_tuning

        yield from gpu_tuning.cases()


def select_calls(batch: int, length: int, part: str, tiles: Any, k: int = K) -> Callable[[Data], list[Call]]:
    def build(data: Data) -> list[Call]:
        calls: list[Call] = []
        for first in data.sets(batch) if length == CONTEXT else range(4):
            queries = data.queries(batch, length, first if length == CONTEXT else 0)
            q_idx = data.normal(batch, I)
            if part == "score":
                calls.append(partial(select.score_keys, q_idx, data.k_idx, queries, tiles))
            elif part == "pick":
                scored = select.score_keys(q_idx, data.k_idx, queries, tiles)
                calls.append(partial(select.pick, *scored, queries, k, tiles))
            else:
                calls.append(partial(select.select, q_idx, data.memory, queries, k, 1, tiles))
        return calls * (3 if batch == 32 else 1)

    return build


def default_select_tiles(batch: int, length: int, k: int = K) -> Any:
    return select_tiles(batch, length // PAGE_SIZE, k, limits(DEVICE))


def select_cases(batch: int, length: int, target: float | None, k: int = K) -> Iterator[Case]:
    name, size = f"batch {batch:2d} context {length // 1024}K", batch * length * I * 2
    name += f" k {k}" if k != K else ""
    tiles = default_select_tiles(batch, length, k)
    yield Case(f"select        {name}", "select", size, target, select_calls(batch, length, "all", tiles, k), tiles)
    yield Case(f"  score       {name}", "select", size, None, select_calls(batch, length, "score", tiles, k))
    yield Case(f"  pick        {name}", "select", 0, None, select_calls(batch, length, "pick", tiles, k))
    if length == CONTEXT and k == K:
        yield Case(f"  torch bmm + topk {name}", "torch", size, None, lambda data: torch_select(data, batch))


def torch_select(data: Data, batch: int) -> list[Call]:
    def call(keys: Tensor, q: Tensor) -> Any:
        return torch.bmm(keys, q)[..., 0].topk(K)

    parts = data.k_idx.view(-1, CONTEXT, I).split(batch)
    return [partial(call, part, data.normal(batch, I, 1)) for part in parts]


def gather_calls(batch: int, how: str, hot: bool, tiles: Any = None) -> Callable[[Data], list[Call]]:
    def build(data: Data) -> list[Call]:
        selections = data.selections(batch, 2 if hot else max(3, 48 // batch))
        q = data.normal(batch, H, D)
        if how == "in place":
            calls = [
                partial(gather_attention.gather_attention, q, data.memory, s, tiles, fresh=False) for s in selections
            ]
        elif how == "copy":
            calls = [partial(gather_attention.compact_rows, data.memory, s) for s in selections]
        elif how == "compact":
            copies = [gather_attention.compact_rows(data.memory, s) for s in selections]
            calls = [partial(gather_attention.compact_attention, q, copy, tiles) for copy in copies]
        else:
            calls = [partial(torch_gather, q, data.memory, s) for s in selections]
        return [call for call in calls for _ in range(LAYERS)] if hot else calls

    return build


def torch_gather(q: Tensor, memory: Memory, selection: Selection) -> Tensor:
    rows = selection.rows.view(-1)
    k, v = (x.index_select(0, rows).view(len(q), K, G, D).transpose(1, 2) for x in (memory.k, memory.v))
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)


def gather_cases(batch: int, target: float) -> Iterator[Case]:
    size = batch * K * ROW
    tiles = attention_tiles(batch, G, K, D, 2, limits(DEVICE))
    yield Case(
        f"gather in place    batch {batch:2d}", "gather", size, target, gather_calls(batch, "in place", False), tiles
    )
    yield Case(f"  16 layers        batch {batch:2d}", "gather", size, target, gather_calls(batch, "in place", True))
    yield Case(f"  compact, copy    batch {batch:2d}", "gather", 2 * size, None, gather_calls(batch, "copy", False))
    yield Case(f"  compact          batch {batch:2d}", "gather", size, target, gather_calls(batch, "compact", False))
    yield Case(f"  compact, 16      batch {batch:2d}", "gather", size, target, gather_calls(batch, "compact", True))
    yield Case(f"  torch index + sdpa batch {batch:2d}", "torch", size, None, gather_calls(batch, "torch", False))


def dense_calls(batch: int, how: str, tiles: Any = None) -> Callable[[Data], list[Call]]:
    def build(data: Data) -> list[Call]:
        q = data.normal(batch, H, D)
        if how == "kernel":
            steps = [data.queries(batch, first=first) for first in data.sets(batch)]
            calls = [partial(dense_attention.dense_attention, q, data.memory, step, tiles) for step in steps]
        else:
            kv = [x.view(-1, CONTEXT, G, D).transpose(1, 2).split(batch) for x in (data.memory.k, data.memory.v)]
            sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
            calls = [partial(sdpa, q[:, :, None], k, v) for k, v in zip(*kv)]
        return calls[:8]

    return build


def dense_cases(batch: int) -> Iterator[Case]:
    size = batch * CONTEXT * ROW
    tiles = context_tiles(batch * G, D, 2, limits(DEVICE))
    yield Case(f"dense 128K         batch {batch:2d}", "dense", size, None, dense_calls(batch, "kernel"), tiles)
    yield Case(f"  torch sdpa       batch {batch:2d}", "torch", size, None, dense_calls(batch, "torch"))


def uneven_cases() -> Iterator[Case]:
    """Whole contexts in a step whose rows differ: 13 of 16 there, lengths from 1K to 128K, one long sequence of 32."""
    spread = torch.linspace(1024, CONTEXT, 32).int()
    lengths = {
        "13 of 16": torch.tensor([CONTEXT] * 13 + [0] * 3, dtype=torch.int32),
        "1K to 128K, 32": spread[torch.randperm(32, generator=torch.Generator().manual_seed(0))],
        "one 128K, 31 4K": torch.tensor([4096] * 16 + [CONTEXT] + [4096] * 15, dtype=torch.int32),
    }
    for name, length in lengths.items():

        def build(data: Data, length: Tensor = length) -> list[Call]:
            queries = replace(data.queries(len(length)), positions=length.to(DEVICE) - 1)
            q = data.normal(len(length), H, D)
            return [partial(dense_attention.dense_attention, q, data.memory, queries)] * 3

        yield Case(f"dense {name}", "dense", int(length.sum()) * ROW, None, build)


def sliding_calls(batch: int, tiles: Any) -> Callable[[Data], list[Call]]:
    def build(data: Data) -> list[Call]:
        rings = max(2, 128 // batch)
        window = Window(data.normal(rings * batch * WINDOW, G, D), data.normal(rings * batch * WINDOW, G, D), WINDOW)
        q, k, v = data.normal(batch, H, D), data.normal(batch, G, D), data.normal(batch, G, D)
        queries = data.queries(batch)
        slots = torch.arange(rings * batch, dtype=torch.int32, device=DEVICE).view(rings, batch)
        steps = [replace(queries, window_slots=own) for own in slots]
        return [
            partial(sliding_attention.sliding_attention, q, k, v, window, step, tiles, fresh=False) for step in steps
        ]

    return build


def sliding_cases(batch: int) -> Iterator[Case]:
    tiles = attention_tiles(batch, G, WINDOW, D, 2, limits(DEVICE))
    size = batch * WINDOW * ROW
    yield Case(f"sliding 512        batch {batch:2d}", "sliding", size, None, sliding_calls(batch, None), tiles)


def write_cases(batch: int) -> Iterator[Case]:
    def build(data: Data) -> list[Call]:
        k, v, k_idx = data.normal(batch, G, D), data.normal(batch, G, D), data.normal(batch, I)
        rows = torch.randperm(data.k_idx.shape[0], generator=data.generator, device=DEVICE)[: 64 * batch]
        mappings = rows.int().view(64, batch)
        return [partial(write_memory.write_memory, data.memory, k, v, k_idx, mapping) for mapping in mappings]

    yield Case(f"write memory       batch {batch:2d}", "write", 2 * batch * (ROW + 2 * I), None, build)


# -- running -----------------------------------------------------------------------------------------------


def graph_time(calls: list[Call], replays: int = 11) -> float:
    """Milliseconds a call, the median of some replays of one graph of all calls."""
    torch.cuda.synchronize()  # the inputs are made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * replays)]
    graph.replay()
    for i in range(replays):
        events[2 * i].record()
        graph.replay()
        events[2 * i + 1].record()
    torch.cuda.synchronize()
    times = [events[2 * i].elapsed_time(events[2 * i + 1]) for i in range(replays)]
    return statistics.median(times) / len(calls)


@triton.jit
def _read_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK, num_stages=1):
        total += tl.load(x + start + i)
    tl.store(out + tl.program_id(0), tl.sum(total))


def read_bandwidth(data: Data) -> float:
    """GB/s of the fastest of a few ways to read a large tensor once."""
    x = data.memory.k.view(-1).view(torch.int32)
    programs = [waves * limits(DEVICE).sm_count for waves in (4, 8, 16)]
    out = torch.empty(max(programs), dtype=torch.int32, device=DEVICE)
    ways: list[Call] = [x.view(torch.float32).sum, x.view(torch.float32).max]
    for p in programs:
        ways += [partial(_read_kernel[p,], x, out, x.numel(), BLOCK=block) for block in (2048, 4096)]
    return max(x.nbytes / graph_time([way], 7) / 1e6 for way in ways)


def compile_share(index: int, count: int, tune: bool) -> None:
    """Run every count-th case once, so that its kernels lie compiled on the disk."""
    import gpu_tuning

    data = Data(small=True)
    different = {gpu_tuning.compile_key(case): case for case in cases(tune) if case.kernel != "torch"}
    for case in list(different.values())[index::count]:
        try:
            calls(case, case.build, data)[0]()
        except Exception as error:  # the timing reports it
            print(case.name, error)
    torch.cuda.synchronize()


def calls(case: Case, build: Callable[[Data], list[Call]], data: Data) -> list[Call]:
    """The calls of a case on the same random inputs each time."""
    sizes.EARLY_LAUNCH = case.early
    limits.cache_clear()
    data.generator.manual_seed(1)
    return build(data)


def measure(case: Case, data: Data) -> float:
    if case.reference is not None:
        import gpu_tuning

        gpu_tuning.compare(calls(case, case.build, data)[0](), calls(case, case.reference, data)[0]())
    return graph_time(calls(case, case.build, data), 5 if case.tuned else 11)


def run(skip: list[str], tune: bool, out: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    data = Data()
    read = read_bandwidth(data)
    rows: list[dict[str, Any]] = []
    every: list[dict[str, Any]] = []
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    for i, case in enumerate([*cases(tune), None]):
        if case is None or i % 50 == 0:
            best = [row for name in dict.fromkeys(r["name"] for r in every) for row in best_of(name, every)]
            out.write_text(json.dumps({**result, "read": read, "rows": rows + best, "tuning": every}))
        if case is None or case.kernel in skip or time.monotonic() > deadline:
            continue
        row: dict[str, Any] = {"name": case.name, "target": case.target, "tiles": short(case.tiles)}
        try:
            row |= {"ms": measure(case, data), "floor": case.bytes / read / 1e6}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        (every if case.tuned else rows).append(row)


def best_of(name: str, rows: list[dict[str, Any]], count: int = 4) -> list[dict[str, Any]]:
    timed = [row for row in rows if row["name"] == name and "ms" in row]
    return sorted(timed, key=lambda row: row["ms"])[:count]


def short(tiles: Any) -> str:
    if tiles is None:
        return ""
    if isinstance(tiles, ContextTiles):
        return f"n{tiles.block_n} p{tiles.programs} w{tiles.num_warps} st{tiles.num_stages}"
    if isinstance(tiles, AttentionTiles):
        return f"n{tiles.block_n} s{tiles.splits} w{tiles.num_warps} st{tiles.num_stages}"
    return (
        f"g{tiles.group} s{tiles.splits} w{tiles.score_warps} st{tiles.score_stages} p{tiles.score_pages} "
        f"n{tiles.search_tile} l{tiles.list_tile} c{tiles.chosen_tile} s{tiles.pick_splits} w{tiles.pick_warps}"
    )
