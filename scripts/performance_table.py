# ruff: noqa: E501  (rows of a table are as long as they are)
"""Write docs/performance.md from the committed result files.

    python scripts/performance_table.py

Every figure of the page comes from `benchmarks/results/h200/*.json`; what was measured how is said there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from performance_sections import (  # type: ignore[import-not-found]
    Steps,
    batch_lines,
    kernel_lines,
    load,
    long_lines,
    of_ops,
    profile_lines,
    sanitizer_lines,
    step_lines,
    sustained_lines,
)

ROOT = Path(__file__).resolve().parent.parent
INTRO = """# Speed

Written by `python scripts/performance_table.py` from `benchmarks/results/h200/`; do not edit. One NVIDIA H200, bfloat16, torch
2.11, triton 3.6, the paper's 4B sizes with a vocabulary of 151,936, random weights and state, exact top-k. Whole steps run from token to
sampled token as one CUDA graph (`scripts/gpu_decode.py`); kernels are timed in graphs over rotating inputs after
their checks passed (`scripts/gpu_check.py`). Floors are the bytes that must move over the read rate measured in the same run.

## Targets
"""
CONCLUSION = """
What a step loses, and where: it is a chain of {launches} launches that need each other's results. A layer of the self-decoder takes {layer:.0f} us at
batch 1 where its {layer_mb:.0f} MB would take {layer_floor:.0f}, and {many:.0f} us at batch 32, where it reads {many_floor:.0f} us of weights and windows. Each product has two
trips through L2 between the end of the one in front and its own sums, a third where K is split, and at batch 32 every program reads its part of
the rows of x again (what that costs: docs/log.md, 2026-11-28). What would be needed at batch 32: x read once for several multiprocessors (multicast in clusters, which
Triton 3.6 does not offer), and an attention over windows that fills its memory as the products do. Dense attention at batch 1 reads at {dense:.0%} of
the ceiling; the rest is its start, where a page table stands between a position and the first key, and its merge of 33 results.

One H200 is not another: cards differ in what they read, and the steps with them (docs/log.md, 2026-11-28); each file says what its card read, and from
2026-11-29 on which commit it ran. The next table is of another card than the steps above: there CLSA takes {slow:.2f} ms at batch 32. Ratios to the Transformer at batch 32
depend on power as well as on memory: its attention reaches the card's limit of power and slows down, CLSA does not. Not run again for longer: prefill
kernel by kernel, steps in fp8, the profile below and KD loss; their kernels are as they were.
"""


def main() -> None:
    steps = {(row["plan"], row["context"], row["batch"]): row for row in load("decode")["rows"]}
    steps |= {(row["plan"], row["context"], row["batch"]): row for row in load("decode_baselines")["rows"]}
    kernels = {row["name"].strip(): row for row in load("kernels")["rows"] if "ms" in row}
    lines = [INTRO, *target_lines(steps, kernels), "", *step_lines(steps), "", *kernel_lines(kernels)]
    layer = next(row for row in load("layers")["rows"] if row["rows"] == 1)
    layer_bytes = 2 * 2560 * (3584 + 2560 + 3 * 7680)
    thirty_two = next(row for row in load("layers")["rows"] if row["rows"] == 32)
    read = load("decode")["read_bandwidth"]
    figures = {
        "many": thirty_two["default_us"][0],
        "many_floor": (layer_bytes + 32 * 512 * 2 * 4 * 128 * 2) / read * 1e6,
        "dense": of_ops("dense_attention", 1)["floor_share"],
        "launches": sum(n for name, _, n in steps["clsa", 131072, 1]["kernels"] if not name.startswith("cuda")),
        "slow": next(r["settled_ms"] for r in load("sustained")["rows"] if (r["plan"], r["batch"]) == ("clsa", 32)),
        "layer": layer["default_us"][0],
        "layer_mb": layer_bytes / 1e6,
        "layer_floor": layer_bytes / read * 1e6,
    }
    lines.append(CONCLUSION.format(**figures))
    lines += [
        *sustained_lines(load("sustained")),
        *profile_lines(load("profile")),
        *batch_lines(load("batch")),
        *long_lines(load("long") | load("served") | load("million")),
        *sanitizer_lines(load("sanitize")),
    ]
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    parser.parse_args().out.write_text("\n".join(lines), encoding="utf-8")


def target_lines(steps: Steps, kernels: dict[str, Any]) -> list[str]:
    """What was aimed at beside what was measured."""
    paper = {row["plan"]: row for row in load("paper")["rows"] if row["context"] == 131072}
    capacity = {row["plan"]: row for row in load("capacity")["rows"]}
    long, distill, warm = load("long") | load("served") | load("million"), load("distill"), load("warm")
    prefill = {row["name"]: row for row in load("prefill_engine")["rows"]}
    one, many = steps["clsa", 131072, 1], steps["clsa", 131072, 32]
    hidden = [steps["clsa", 131072, b]["engine_step_ms"] / steps["clsa", 131072, b]["graph_ms"] - 1 for b in (1, 8, 32)]
    loss = next(row for row in distill["times"] if row["length"] == 32768)
    rows = [
        (
            "decode step, 128K, batch 32",
            "<= 2.8 ms, >= 11,400 tokens/s",
            f"{many['graph_ms']:.3f} ms, {32 / many['engine_step_ms'] * 1e3:,.0f} tokens/s",
        ),
        ("decode step, 128K, batch 1", "<= 1.7 ms", f"{one['graph_ms']:.2f} ms"),
        (
            "decode, CLSA over our Transformer, 128K, batch 32",
            ">= 20x",
            f"{paper['clsa']['decode_ratio']:.1f}x ({paper['transformer']['note']})",
        ),
        (
            "throughput at the card's capacity, 128K, over our Transformer",
            ">= 40x",
            f"{capacity['clsa']['ratio']:.1f}x ({capacity['clsa']['tokens_per_second']:,.0f} tokens/s of {capacity['clsa']['batch']} sequences against "
            f"{capacity['transformer']['tokens_per_second']:,.0f} of {capacity['transformer']['batch']})",
        ),
        (
            "end to end, 128K in, 10K out, 32 requests, over our Transformer",
            ">= 17x",
            f"{paper['clsa']['end_to_end_ratio']:.1f}x (by the formula of `clsa bench paper`)",
        ),
        (
            "the same, really run",
            ">= 5 x 1,068 tokens/s",
            f"{long['serve']['tokens_per_second']:,.0f} tokens/s",
        ),
        (
            "prefill, one prompt of 128K",
            ">= 160K tokens/s",
            f"{paper['clsa']['prefill_tokens_per_second']:,.0f}",
        ),
        (
            "prefill, 64 prompts of 2K",
            ">= 160K tokens/s",
            f"{prefill['prefill 64 x 2K, 8192 a step']['tokens_per_second']:,.0f}",
        ),
        (
            "routing, 128K, batch 32 / batch 1",
            "<= 0.30 / <= 0.030 ms",
            " / ".join(f"{kernels[f'select        batch {b:2d} context 128K']['ms']:.3f}" for b in (32, 1)) + " ms",
        ),
        (
            "attention over the selected rows, batch 32 / 8 / 1",
            "<= 0.040 / 0.018 / 0.010 ms",
            " / ".join(f"{of_ops('gather_attention', b)['seconds'] * 1e3:.3f}" for b in (32, 8, 1)) + " ms",
        ),
        ("engine step over its graph, batch 1 / 8 / 32", "<= 3 %", " / ".join(f"{x:.1%}" for x in hidden)),
        ("a step at 1M tokens over one at 8K, batch 1", "<= 1.2", f"{long['million']['step_ratio']:.2f}"),
        (
            "index KD loss, forward and backward, 32K",
            "<= 3 x its QK^T",
            f"{loss['ratio']:.2f} x, {max(row['bytes'] for row in distill['memory']) / 1e6:,.0f} MB at most from 4K to 32K",
        ),
        (
            "start of a process to the first token, kernels compiled before",
            "< 20 s",
            f"{warm['first_token']:.1f} s ({warm['weights']:.1f} s of them until the random weights are there)",
        ),
    ]
    return ["| | target | measured |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    main()
