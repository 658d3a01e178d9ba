"""The index distillation loss on a GPU: is it right, how long does it take, and how much memory, at the 4B sizes.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_distill.py --out distill.json

Checks loss and gradients at 2,048 tokens against the definition, everything materialised. Then times forward and
backward against the products of queries and keys alone: torch.matmul in bfloat16 over the same blocks of queries, each
with the keys up to its last query, and that time multiplied by the share of the pairs that are visible. So the products
are counted once and for the causal half, though the loss makes them twice: once for each head's softmax sum, and once
for the average. Takes less than a minute; the exit code is 0 if the checks passed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from clsa.bench.report import provenance
from clsa_cuda import distill
from clsa_cuda.distill import Teacher, index_kd_loss, query_blocks
from clsa_cuda.kernels.distill import DistillTiles, softmax_sums, weighted_attention

DEVICE = torch.device("cuda")
L, H, G, D, I = 16, 20, 4, 128, 128  # layers, heads, KV heads, head dim, index dim
CHECKED, TUNED, TIMED = 2048, 8192, (8192, 32768)
MEASURED = (4096, 8192, 16384, 32768)
TARGET = 3.0  # times the products alone
LOSS_ERROR, GRADIENT_ERROR = 1e-5, 1e-4  # relative, for float32 index vectors and bfloat16 queries and keys
SUM_TILES = [(128, 128, 8, 2, 128), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 2)]
ATTENTION_TILES = [
    (64, 128, 4, 3),
    (64, 128, 4, 2),
    (64, 128, 4, 2, 168),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (64, 256, 8, 3),
]


@dataclass
class Inputs:
    """One sequence of `length` tokens, laid out as the model has it: tokens first."""

    length: int
    seed: int = 0

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=DEVICE).to(dtype)

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator(DEVICE).manual_seed(self.seed)

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """q_idx and k_idx [1, T, I] float32, that take gradients."""
        q, k = (self.normal(1, self.length, I, dtype=torch.float32).requires_grad_() for _ in range(2))
        return q, k

    @cached_property
    def k(self) -> Tensor:
        return self.normal(1, self.length, G, D).transpose(1, 2)

    @cached_property
    def layers(self) -> list[Tensor]:
        return [2 * self.normal(1, self.length, H, D).transpose(1, 2) for _ in range(L)]

    def teacher(self) -> Teacher:
        teacher = Teacher()
        for q in self.layers:
            teacher.add(q, self.k)
        return teacher

    def loss_and_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        loss = index_kd_loss(*self.index, self.teacher())
        dq, dk = torch.autograd.grad(loss, self.index)
        return loss.detach(), dq, dk

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What the kernels take of each block of queries: q [1, G, M, C, D] and k [1, G, S, D]."""
        for start, stop in query_blocks(1, self.length):
            groups = [q[:, :, start:stop].unflatten(1, (G, -1)) for q in self.layers]
            yield torch.stack(groups, dim=2).flatten(2, 3), self.k[:, :, :stop]


def defined(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients by equations 5 and 6 and autograd: float32 for each head, float64 from there on."""
    length = inputs.length
    future = torch.ones(length, length, dtype=torch.bool, device=DEVICE).triu(1)
    target = torch.zeros(length, length, dtype=torch.float64, device=DEVICE)
    for q in inputs.layers:
        for h in range(H):
            scores = q[0, h].float() @ inputs.k[0, h // (H // G)].float().T / D**0.5
            target += scores.masked_fill(future, -torch.inf).softmax(-1) / (L * H)
    q_idx, k_idx = (x.detach()[0].double().requires_grad_() for x in inputs.index)
    student = (q_idx @ k_idx.T / I**0.5).masked_fill(future, -torch.inf).log_softmax(-1).masked_fill(future, 0.0)
    loss = (torch.xlogy(target, target) - target * student).sum(-1).mean()
    return loss.detach(), *torch.autograd.grad(loss, (q_idx, k_idx))


def check() -> dict[str, Any]:
    """Relative errors of loss, dq and dk, and whether a second run gives the same bits."""
    inputs = Inputs(CHECKED)
    with mock.patch.object(distill, "_BLOCK_SCORES", CHECKED * CHECKED // 4):  # four blocks of queries
        first, second = inputs.loss_and_gradients(), inputs.loss_and_gradients()
    want = defined(inputs)
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(first, want)]
    found: dict[str, Any] = dict(zip(("loss", "dq", "dk"), errors))
    found["value"] = float(first[0])
    found["same_bits"] = all(torch.equal(a, b) for a, b in zip(first, second))
    found["passed"] = found["same_bits"] and errors[0] <= LOSS_ERROR and max(errors[1:]) <= GRADIENT_ERROR
    return found


def milliseconds(call: Callable[[], Any], runs: int = 3) -> float:
    """The median of some runs after one that warms up."""
    call()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def products(blocks: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    """All heads' scores of each block, one KV head's queries at a time into the same memory."""
    for q, k in blocks:
        for g in range(G):
            rows = q[0, g].flatten(0, 1)  # [M * C, D]
            size = rows.shape[0] * k.shape[2]
            torch.matmul(rows, k[0, g].T, out=out[:size].view(rows.shape[0], k.shape[2]))


def all_sums(blocks: list[tuple[Tensor, Tensor]], tiles: DistillTiles | None = None) -> list[Tensor]:
    return [softmax_sums(q, k, tiles) for q, k in blocks]


def all_attention(blocks: list[tuple[Tensor, Tensor]], sums: list[Tensor], tiles: DistillTiles | None = None) -> None:
    for (q, k), s in zip(blocks, sums):
        weighted_attention(q, k, s, 1 / (L * H), tiles)


def time_all(length: int) -> dict[str, Any]:
    """Milliseconds of the loss with its gradients, of its two passes, and of the products alone."""
    inputs = Inputs(length)
    loss = milliseconds(inputs.loss_and_gradients)
    blocks = list(inputs.blocks())
    out = torch.empty(max(q[0, 0, ..., 0].numel() * k.shape[2] for q, k in blocks), dtype=torch.bfloat16, device=DEVICE)
    made = sum(q.shape[3] * k.shape[2] for q, k in blocks)
    visible = length * (length + 1) / 2
    qk = milliseconds(partial(products, blocks, out)) * visible / made
    sums = all_sums(blocks)
    passes = milliseconds(partial(all_sums, blocks)), milliseconds(partial(all_attention, blocks, sums))
    flops = 2 * D * L * H * visible
    return {
        "length": length,
        "loss": loss,
        "qk": qk,
        "ratio": loss / qk,
        "sums": passes[0],
        "attention": passes[1],
        "qk_tflops": flops / qk / 1e9,
        "passes_tflops": 2 * flops / sum(passes) / 1e9,
    }


def peak_memory(length: int) -> dict[str, int]:
    """Bytes above the inputs while the loss and its gradients are made."""
    inputs = Inputs(length)
    inputs.loss_and_gradients()  # makes the inputs, too
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    inputs.loss_and_gradients()
    return {"length": length, "bytes": torch.cuda.max_memory_allocated() - before}


def tune() -> list[dict[str, Any]]:
    """Milliseconds of each pass with other tiles."""
    blocks = list(Inputs(TUNED).blocks())
    sums = all_sums(blocks)
    rows = []
    for name, tiles in [("sums", t) for t in SUM_TILES] + [("attention", t) for t in ATTENTION_TILES]:
        chosen = DistillTiles(*tiles)
        call = partial(all_sums, blocks, chosen) if name == "sums" else partial(all_attention, blocks, sums, chosen)
        row: dict[str, Any] = {"pass": name, "tiles": astuple(chosen)}
        try:
            row["ms"] = milliseconds(call)
        except Exception as error:  # such as too little shared memory
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rows.append(row)
    return rows


def report(result: dict[str, Any]) -> None:
    found = result["check"]
    print(f"{result['device']}, torch {result['torch']}, triton {result['triton']}")
    errors = ", ".join(f"{name} {found[name]:.1e}" for name in ("loss", "dq", "dk"))
    print(f"check at {CHECKED}: {'passed' if found['passed'] else 'FAILED'}; relative errors {errors}")
    print(f"  tokens   loss ms   QK^T ms  ratio (target {TARGET:g})  sums ms  average ms  TFLOP/s: the passes, QK^T")
    for row in result["times"]:
        times = f"{row['length']:8d} {row['loss']:9.2f} {row['qk']:9.2f} {row['ratio']:6.2f}"
        passes = f"{row['sums']:8.2f} {row['attention']:11.2f}"
        print(f"{times} {'':11} {passes} {row['passes_tflops']:21.0f} {row['qk_tflops']:11.0f}")
    print("peak MB: " + ", ".join(f"{row['length']}: {row['bytes'] / 2**20:.0f}" for row in result["memory"]))
    for row in result["tiles"]:
        print(f"{row['pass']:10} {row['tiles']!s:24} {row['error'] if 'error' in row else format(row['ms'], '8.2f')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    result = provenance() | {"device": torch.cuda.get_device_name()}
    result |= {"torch": torch.__version__, "triton": triton.__version__}
    result |= {"sizes": {"L": L, "H": H, "G": G, "D": D, "I": I}, "check": check()}
    result |= {"memory": [peak_memory(n) for n in MEASURED], "times": [time_all(n) for n in TIMED], "tiles": tune()}
    report(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0 if result["check"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
