"""Checks of `gpu_check.py`: select and the writes at real sizes against the plain torch ops; runs all groups."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Queries, Selection, Window
from clsa_cuda import select as plain_select
from clsa_cuda import state
from clsa_cuda.kernels import select, write_memory

DEVICE = torch.device("cuda", 0)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SCORE_ERROR = 2e-6
LONG = 1 << 17
Check = tuple[str, Callable[[], None]]


def run(name: str, out: Path) -> None:
    """Run the checks of one group and write after each how it went: "ok" or what was wrong."""
    import gpu_attention

    poison_empty()
    torch.set_float32_matmul_precision("highest")
    results = {}
    for label, check in {**GROUPS, **gpu_attention.GROUPS}[name]():
        results[label] = "not finished"
        out.write_text(json.dumps(results))
        try:
            check()
            torch.cuda.synchronize()
            results[label] = "ok"
        except Exception:
            results[label] = traceback.format_exc(limit=-3)
        out.write_text(json.dumps(results))
        torch.cuda.empty_cache()


def poison_empty() -> None:
    """What a kernel does not write must not look like a result."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min)

    torch.empty = poisoned


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(g: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=g, device=DEVICE, dtype=dtype)


def queries_of(lengths: list[int], pages: Tensor, max_pages: int) -> Queries:
    """One query a sequence, at its last token; length 0 is a padded row. `pages` are handed out in their order."""
    table = torch.full((len(lengths), max_pages), -1, dtype=torch.int32)
    taken = 0
    for b, length in enumerate(lengths):
        count = -(-length // PAGE_SIZE)
        table[b, :count] = pages[taken : taken + count].cpu()
        taken += count
    sequence = torch.arange(len(lengths), dtype=torch.int32)
    positions = torch.tensor(lengths, dtype=torch.int32) - 1
    arrays = (x.to(DEVICE) for x in (positions, sequence, table, sequence))
    return Queries(*arrays, tuple(range(len(lengths) + 1)), tuple(lengths))


def visible_rows(queries: Queries, b: int) -> Tensor:
    i = torch.arange(queries.context_lens[b], device=DEVICE)
    return queries.block_table[b, i // PAGE_SIZE].long() * PAGE_SIZE + i % PAGE_SIZE


def index_memory(num_rows: int, keys: Callable[[Tensor], Tensor], queries: Queries, dtype: torch.dtype) -> Memory:
    """NaN in every row that no query sees; `keys(positions)` [n, I] in the others."""
    k_idx = torch.full((num_rows + state.SPARE_ROWS, 128), float("nan"), dtype=dtype, device=DEVICE)
    k_idx[num_rows:] = 0
    for b, length in enumerate(queries.context_lens):
        if length:
            k_idx[visible_rows(queries, b)] = keys(torch.arange(length, device=DEVICE)).to(dtype)
    return Memory(k_idx[:, None], k_idx[:, None], k_idx)


def same(got: Selection, want: Selection, case: object) -> None:
    for name in ("lengths", "positions", "rows"):
        a, b = getattr(got, name), getattr(want, name)
        if not torch.equal(a, b):
            where = (a != b).nonzero()[0].tolist()
            first = f"first at {where}: {a[tuple(where)]}, wanted {b[tuple(where)]}"
            raise AssertionError(f"{case}: {name} differ in {int((a != b).sum())} places, {first}")


# -- select ------------------------------------------------------------------------------------------------

RAGGED = [LONG, 1, 2047, 2048, 2049, 0, LONG - 1, 65, 100_003, 70_000, 0, 64, 4095, 9000, 33_333, 131_000]


def select_checks() -> Iterator[Check]:
    for name, dtype in DTYPES.items():
        for k in (2048, 1, 100, 8192):
            yield f"select {name} ties k={k}", lambda dtype=dtype, k=k: select_ties(RAGGED, LONG, k, dtype)
        yield f"select {name} real scores", lambda dtype=dtype: select_real(dtype)
    yield "select bf16 million ties", lambda: select_ties([1 << 20, 999_999], 1 << 20, 2048, torch.bfloat16)
    yield "select bf16 million k=8192", lambda: select_ties([1 << 20, 5000], 1 << 20, 8192, torch.bfloat16)
    yield "select bf16 short table", lambda: select_ties([8192, 1, 8000, 2048, 63], 8192, 2048, torch.bfloat16)
    yield "select bf16 high rows", lambda: select_ties([LONG, 7777], LONG, 2048, torch.bfloat16, num_pages=266_000)
    yield "select bf16 repeats", select_repeats


def small_integers(seed: int, width: int = 2) -> Callable[[Tensor], Tensor]:
    """Every score is exact in every dtype, and most are shared by many positions."""
    g = generator(seed)
    return lambda i: torch.randint(-width, width + 1, (len(i), 128), generator=g, device=DEVICE)


def select_ties(lengths: list[int], context: int, k: int, dtype: torch.dtype, num_pages: int | None = None) -> None:
    num_pages = num_pages or sum(-(-n // PAGE_SIZE) for n in lengths) + 3
    pages = torch.randperm(num_pages, generator=generator(1), device=DEVICE)
    queries = queries_of(lengths, pages, context // PAGE_SIZE)
    memory = index_memory(num_pages * PAGE_SIZE, small_integers(2), queries, dtype)
    q_idx = small_integers(3)(torch.arange(len(lengths))).to(dtype)
    q_idx[queries.positions < 0] = float("nan")
    same(select.select(q_idx, memory, queries, k, 1), plain_select.select(q_idx, memory, queries, k, 1), k)


def select_real(dtype: torch.dtype) -> None:
    """Random scores: the form must be right, and no score left out may beat one taken by more than rounding."""
    queries = queries_of(RAGGED, torch.randperm(20_000, generator=generator(1), device=DEVICE), LONG // PAGE_SIZE)
    g = generator(4)
    memory = index_memory(
        20_000 * PAGE_SIZE, lambda i: torch.randn(len(i), 128, generator=g, device=DEVICE), queries, dtype
    )
    q_idx = torch.randn(len(RAGGED), 128, generator=g, device=DEVICE).to(dtype)
    k = 2048
    got = select.select(q_idx, memory, queries, k, 1)
    for b, length in enumerate(RAGGED):
        n = min(length, k)
        assert int(got.lengths[b]) == n, (b, length)
        chosen = got.positions[b, :n].long()
        assert (got.positions[b, n:] == -1).all() and (got.rows[b, n:] == -1).all(), (b, length)
        if n == 0:
            continue
        assert chosen[0] >= 0 and (chosen.diff() > 0).all() and chosen[-1] < length, (b, length)
        rows = visible_rows(queries, b)
        assert torch.equal(got.rows[b, :n].long(), rows[chosen]), (b, length)
        keys = memory.k_idx[rows].double()
        scores = keys @ q_idx[b].double()
        left = torch.ones(length, dtype=torch.bool, device=DEVICE)
        left[chosen] = False
        slack = SCORE_ERROR * q_idx[b].double().norm() * keys.norm(dim=1).max()
        if left.any():
            assert scores[chosen].min() >= scores[left].max() - slack, (b, length)


def select_repeats() -> None:
    """The same bits 1,000 times, and alone as in the batch."""
    lengths = [LONG, LONG - 77, 100_000, 3000] * 4
    queries = queries_of(lengths, torch.randperm(30_000, generator=generator(1), device=DEVICE), LONG // PAGE_SIZE)
    g = generator(5)
    memory = index_memory(
        30_000 * PAGE_SIZE, lambda i: torch.randn(len(i), 128, generator=g, device=DEVICE), queries, torch.bfloat16
    )
    q_idx = torch.randn(len(lengths), 128, generator=g, device=DEVICE).bfloat16()
    first = select.select(q_idx, memory, queries, 2048, 1)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        again = select.select(q_idx, memory, queries, 2048, 1)
        wrong += (again.positions != first.positions).sum() + (again.rows != first.rows).sum()
    assert int(wrong) == 0, f"{int(wrong)} differences in 1,000 repeats"
    for b in (0, 3, 13):
        alone = replace(
            queries, positions=queries.positions[b : b + 1].clone(), sequence=queries.sequence[b : b + 1].clone()
        )
        got = select.select(q_idx[b : b + 1], memory, alone, 2048, 1)
        assert torch.equal(got.rows[0], first.rows[b]), f"query {b} alone"


def special_checks() -> Iterator[Check]:
    inf, nan = float("inf"), float("nan")
    g = generator(6)

    def choice(*values: float) -> Callable[[Tensor], Tensor]:
        table = torch.tensor(values, device=DEVICE)
        return lambda i: table[torch.randint(len(values), (len(i),), generator=g, device=DEVICE)]

    patterns: dict[str, Callable[[Tensor], Tensor]] = {
        "all equal": choice(1.0),
        "all nan": choice(nan),
        "all -inf": choice(-inf),
        "all inf": choice(inf),
        "zeros": choice(0.0, -0.0),
        "everything": choice(nan, inf, -inf, 0.0, 1.0, -1.0, 60000.0, -60000.0),
        "nan or -inf": choice(nan, -inf),
        "rare": lambda i: torch.where(i % 1000 == 7, 1.0, -inf),
        "ascending": lambda i: (i // 1024).float(),
        "side by side": lambda i: torch.where((i > 50_000) & (i < 53_000), 2.0, 0.0) + choice(0.0, 0.5)(i),
        "one bin": lambda i: 1000.0 + choice(0.0, 0.5)(i),
    }
    for name, pattern in patterns.items():
        for k in (2048, 8192):
            yield f"select_special bf16 {name} k={k}", lambda p=pattern, k=k: select_pattern(p, k, torch.bfloat16)
        yield f"select_special f32 {name}", lambda p=pattern: select_pattern(p, 2048, torch.float32)


def select_pattern(pattern: Callable[[Tensor], Tensor], k: int, dtype: torch.dtype) -> None:
    """Only the first index dimension counts, so that a score is the key itself."""

    def keys(i: Tensor) -> Tensor:
        out = torch.zeros(len(i), 128, device=DEVICE)
        out[:, 0] = pattern(i)
        return out

    lengths = [LONG, 2048, 60_001, 0]
    queries = queries_of(lengths, torch.randperm(3100, generator=generator(1), device=DEVICE), LONG // PAGE_SIZE)
    memory = index_memory(3100 * PAGE_SIZE, keys, queries, dtype)
    q_idx = torch.zeros(len(lengths), 128, device=DEVICE, dtype=dtype)
    q_idx[:, 0] = 1
    # The plain op on exact scores, without a matrix product that might not keep inf * 0 apart.
    got = select.select(q_idx, memory, queries, k, 1)
    for b, length in enumerate(lengths):
        scores = memory.k_idx[visible_rows(queries, b), 0].float()[None]
        last = torch.tensor([length - 1], device=DEVICE)
        want = plain_select.best_positions(scores, last, k, 1) if length else torch.full_like(got.positions[:1], -1)
        assert torch.equal(got.positions[b : b + 1], want), f"sequence {b} of {length}"


# -- writes ------------------------------------------------------------------------------------------------


def write_checks() -> Iterator[Check]:
    for name, dtype in DTYPES.items():
        for heads in ((4, 128), (1, 80)):
            yield f"write {name} {heads}", lambda dtype=dtype, heads=heads: write(dtype, *heads, num_rows=5000)
    yield "write bf16 high rows", lambda: write(torch.bfloat16, 4, 128, num_rows=(1 << 22) + 5000)


def write(dtype: torch.dtype, kv_heads: int, head_dim: int, num_rows: int) -> None:
    g = generator(10)
    for with_index in (True, False):
        shapes = [(kv_heads, head_dim)] * 2 + [(128,)] * with_index
        new = [normal(g, 300, *shape, dtype=dtype) for shape in shapes]
        mapping = (num_rows - 5000 + torch.randperm(5000, generator=g, device=DEVICE)[:300]).int()
        mapping[::7] = -1
        targets = [torch.zeros(num_rows, *shape, dtype=dtype, device=DEVICE) for shape in shapes]
        memory = Memory(targets[0], targets[1], targets[2] if with_index else None)
        write_memory.write_memory(memory, new[0], new[1], new[2] if with_index else None, mapping)
        kept = mapping >= 0
        for target, values in zip(targets, new):
            assert torch.equal(target[mapping[kept].long()], values[kept])
            assert int((target != 0).flatten(1).any(1).sum()) == int(kept.sum())
        if num_rows < 10_000:
            window = Window(torch.zeros_like(targets[0]), torch.zeros_like(targets[1]), 500)
            write_memory.write_window(window, new[0], new[1], mapping)
            assert torch.equal(window.k, targets[0]) and torch.equal(window.v, targets[1])


GROUPS: dict[str, Callable[[], Iterator[Check]]] = {
    "write": write_checks,
    "select": select_checks,
    "select_special": special_checks,
}
