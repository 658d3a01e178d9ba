# ruff: noqa: E501  (rows of a table are as long as they are)
"""Write docs/performance.md from the committed result files.

    python scripts/performance_table.py

Every figure of the page comes from `benchmarks/results/h200/*.json`; what was measured how is said there.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200"
Steps = dict[tuple[str, int, int], dict[str, Any]]
INTRO = """# Speed

Written by `python scripts/performance_table.py` from `benchmarks/results/h200/`; do not edit. One NVIDIA H200, bfloat16, torch
2.11, triton 3.6, the paper's 4B sizes with a vocabulary of 151,936, random weights and state, exact top-k. Whole steps run from token to
sampled token as one CUDA graph (`scripts/gpu_decode.py`); kernels are timed in graphs over rotating inputs after
their checks passed (`scripts/gpu_check.py`). Floors are the bytes that must move over the read rate measured in the same run.

## Targets
"""
CONCLUSION = """
What is missed, and why: a step is a chain of {launches} launches that need each other's results. A layer of the self-decoder takes {layer:.0f} us at
batch 1 where its {layer_mb:.0f} MB would take {layer_floor:.0f}. Clocks put into the kernels for one run (docs/log.md; they are not kept) said where: products stream their weights at 3.3 to 4.1 TB/s, 40 us
in all; between the last store of one and the full stream of the next pass 2 us, four times; attention over the window takes 6. At batch 32 the
same gaps are 3.5 us. What would be needed: weights of the next two products on their way while one finishes, which takes a ring of
shared memory for the tensor cores' own layout and one program a multiprocessor in every kernel; measured with slower products it gained 2 to 3 us a
layer. Of the targets at batch 1 and 32 it would reach neither alone.
"""


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    steps = {(row["plan"], row["context"], row["batch"]): row for row in load("decode")["rows"]}
    steps |= {(row["plan"], row["context"], row["batch"]): row for row in load("decode_baselines")["rows"]}
    kernels = {row["name"].strip(): row for row in load("kernels")["rows"] if "ms" in row}
    lines = [INTRO, *target_lines(steps, kernels), "", *step_lines(steps), "", *kernel_lines(kernels)]
    layer = next(row for row in load("layers")["rows"] if row["rows"] == 1)
    layer_bytes = 2 * 2560 * (3584 + 2560 + 3 * 7680)
    figures = {
        "launches": sum(count for _, _, count in steps["clsa", 131072, 1]["kernels"]),
        "layer": layer["default_us"][0],
        "layer_mb": layer_bytes / 1e6,
        "layer_floor": layer_bytes / load("decode")["read_bandwidth"] * 1e6,
    }
    lines.append(CONCLUSION.format(**figures))
    for name, section in (("profile", profile_lines), ("long", long_lines)):
        if (RESULTS / f"{name}.json").exists():
            lines += section(load(name))
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    parser.parse_args().out.write_text("\n".join(lines), encoding="utf-8")


def target_lines(steps: Steps, kernels: dict[str, Any]) -> list[str]:
    """What was aimed at beside what was measured."""
    paper = {row["plan"]: row for row in load("paper")["rows"] if row["context"] == 131072}
    capacity = {row["plan"]: row for row in load("capacity")["rows"]}
    long, distill, warm = load("long"), load("distill"), load("warm")
    prefill = {row["name"]: row for row in load("prefill_kernels")["rows"] if "tokens_per_second" in row}
    one, many = steps["clsa", 131072, 1], steps["clsa", 131072, 32]
    hidden = [steps["clsa", 131072, b]["engine_step_ms"] / steps["clsa", 131072, b]["graph_ms"] - 1 for b in (1, 8, 32)]
    loss = next(row for row in distill["times"] if row["length"] == 32768)
    rows = [
        (
            "decode step, 128K, batch 32",
            "<= 2.8 ms, >= 11,400 tokens/s",
            f"{many['graph_ms']:.2f} ms, {paper['clsa']['decode_tokens_per_second']:,.0f} tokens/s",
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
            f"{long['serve']['tokens_per_second']:,.0f} tokens/s (earlier run)",
        ),
        (
            "prefill, one prompt of 128K",
            ">= 160K tokens/s",
            f"{prefill['prefill 1 x 128K, 8192 a step']['tokens_per_second']:,.0f} (earlier run)",
        ),
        (
            "prefill, 64 prompts of 2K",
            ">= 160K tokens/s",
            f"{prefill['prefill 64 x 2K, 8192 a step']['tokens_per_second']:,.0f} (earlier run)",
        ),
        (
            "routing, 128K, batch 32 / batch 1",
            "<= 0.30 / <= 0.030 ms",
            " / ".join(f"{kernels[f'select        batch {b:2d} context 128K']['ms']:.3f}" for b in (32, 1)) + " ms",
        ),
        (
            "attention over the selected rows, batch 32 / 8 / 1",
            "<= 0.040 / 0.018 / 0.010 ms",
            " / ".join(f"{gathered(b)['ms']:.3f}" for b in (32, 8, 1)) + " ms" + gathered(1).get("earlier", ""),
        ),
        ("engine step over its graph, batch 1 / 8 / 32", "<= 3 %", " / ".join(f"{x:.1%}" for x in hidden)),
        ("a step at 1M tokens over one at 8K, batch 1", "<= 1.2", f"{long['million']['step_ratio']:.2f} (earlier run)"),
        (
            "index KD loss, forward and backward, 32K",
            "<= 3 x its QK^T",
            f"{loss['ratio']:.2f} x, {max(row['bytes'] for row in distill['memory']) / 1e6:,.0f} MB at most from 4K to 32K (earlier run)",
        ),
        (
            "start of a process to the first token, kernels compiled before",
            "< 20 s",
            f"{warm['first_token']:.1f} s ({warm['weights']:.1f} s of them until the random weights are there; earlier run)",
        ),
    ]
    return ["| | target | measured |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def step_lines(steps: Steps) -> list[str]:
    lines = [
        "## Steps",
        "",
        "| decode step, 128K | graph ms | engine step ms | floor ms | share | tokens/s |",
        "|---|---|---|---|---|---|",
        *(_step_row(f"CLSA, batch {batch}", steps["clsa", 131072, batch]) for batch in (1, 8, 32)),
    ]
    for row in load("decode_fp8")["rows"]:
        lines.append(_step_row(f"CLSA, batch {row['batch']}, in fp8: {row['fp8'].replace('+', ', ')}", row))
    for plan, name in (("yoco", "YOCO dense"), ("transformer", "Transformer")):
        lines.append(_step_row(f"{name}, batch 1", steps[plan, 131072, 1]))
    lines += [
        "",
        "All plans in one engine, batch 32 (`clsa bench paper`; end to end by its formula, with 8 % of the context as answer; a decode layer's share of the",
        "feed-forward, attention and routing measured op by op):",
        "",
        "| plan | context | prefill tokens/s | decode tokens/s | ratio | end to end tokens/s | ratio | MLP us a layer | attention us | routing us | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in load("paper")["rows"]:
        parts = " | ".join(f"{row[f'layer_{part}_seconds'] * 1e6:,.1f}" for part in ("mlp", "attention", "routing"))
        lines.append(
            f"| {row['plan']} | {row['context']:,} | {row['prefill_tokens_per_second']:,.0f} | {row['decode_tokens_per_second']:,.0f} | {row['decode_ratio']:.1f} | "
            f"{row['end_to_end_tokens_per_second']:,.0f} | {row['end_to_end_ratio']:.1f} | {parts} | {row['note']} |"
        )
    lines += [
        "",
        "![The five plans](paper.svg)",
        "",
        "At the batch that fits the card (`clsa bench capacity`; the Transformer at 81 % of its floor, by tiles since changed:",
    ]
    lines += ["at 97 %, as at batch 32, the ratio would be 48):", ""]
    lines += [
        "| plan | context | sequences | step ms | of its floor | tokens/s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in load("capacity")["rows"]:
        lines.append(
            f"| {row['plan']} | {row['context']:,} | {row['batch']} | {row['step_seconds'] * 1e3:.2f} | {row['floor_share']:.0%} | {row['tokens_per_second']:,.0f} | {row['ratio']:.1f} |"
        )
    return lines


def kernel_lines(kernels: dict[str, Any]) -> list[str]:
    lines = ["## Kernels", "", "| one kernel, 128K | ms | floor ms | target ms |", "|---|---|---|---|"]
    for batch, target in ((1, "0.030"), (8, ""), (32, "0.300")):
        row = kernels[f"select        batch {batch:2d} context 128K"]
        lines.append(f"| routing (scores and top-k), batch {batch} | {row['ms']:.4f} | {row['floor']:.4f} | {target} |")
    for batch, target in ((1, "0.010"), (8, "0.018"), (32, "0.040")):
        row = gathered(batch)
        lines.append(
            f"| attention over the selected rows, a layer of 16, batch {batch}{row.get('earlier', '')} | {row['ms']:.4f} | {row['floor']:.4f} | {target} |"
        )
    found = {
        row["name"].split()[-1]: row
        for row in load("kernels")["rows"]
        if row["name"].startswith("dense") and "ms" in row
    }
    for batch in (1, 8, 32):
        row = found[str(batch)]
        lines.append(
            f"| dense attention, batch {batch} | {row['ms']:.4f} | {row['floor']:.4f} | 85 % of the floor: {row['floor'] / 0.85:.3f} |"
        )
    return lines


def gathered(batch: int) -> dict[str, Any]:
    """The attention over the selected rows; from an earlier file where the checks of the newest did not finish."""
    newest = _after(load("kernels")["rows"], "gather in place", "16 layers")
    return (
        newest[batch]
        if batch in newest
        else _after(load("kernels_3")["rows"], "gather in place", "16 layers")[batch] | {"earlier": " (earlier run)"}
    )


def profile_lines(result: Any) -> list[str]:
    """Kernels of decode steps, from `scripts/gpu_profile.py`."""
    lines = [
        "## Profile of a decode step",
        "",
        f"`scripts/gpu_profile.py`, {result['device']}, torch {result['torch']}; floors at {result['read_bandwidth'] / 1e12:.2f} TB/s as read in the same run.",
        "A kernel is launched before the one in front of it has ended, so the durations of a step add up to more than it takes;",
        "that lengthens every row, and shares of floors are lower bounds.",
    ]
    for row in result["rows"]:
        lines += [
            "",
            f"{row['plan'].upper()}, {row['context']:,} tokens, batch {row['batch']}: the step takes {row['graph_ms']:.3f} ms, its {row['launches']:.0f} launches "
            f"last {row['summed_us'] / 1e3:.3f} ms together, floor {row['floor_us'] / 1e3:.3f} ms.",
            "",
            "| kernel | what | launches | us | share | MB that must move | of its floor |",
            "|---|---|---|---|---|---|---|",
        ]
        for kernel in row["kernels"]:
            name = kernel["kernel"].replace("|", " ")[:48]
            moved = f"{kernel['bytes'] / 1e6:,.1f}" if kernel["bytes"] else ""
            floor = f"{kernel['of_floor']:.0%}" if kernel["of_floor"] else ""
            lines.append(
                f"| `{name}` | {kernel['what']} | {kernel['launches']:.0f} | {kernel['us']:,.1f} | {kernel['share']:.1%} | {moved} | {floor} |"
            )
    return [*lines, ""]


def long_lines(result: Any) -> list[str]:
    """Long runs through the engine, from `scripts/gpu_long.py`; parts that were not run are left out."""
    lines = [
        "## Long runs",
        "",
        f"`scripts/gpu_long.py`, {result['machine']['device']}, through the engine, with the kernels of decode_5.json.",
    ]
    if found := result.get("answer"):
        grown = {k: found["memory_after"][k] - found["memory_before"][k] for k in found["memory_after"]}
        lines += [
            "",
            f"An answer of {found['tokens']:,} tokens behind {found['context']:,}: steps of {found['first_steps_ms']:.3f} ms at first and {found['last_steps_ms']:.3f} ms at "
            f"the end (medians of {found['steps_compared']:,}). Growth meanwhile: "
            + ", ".join(f"{name.replace('_', ' ')} {size / 1e6:+.1f} MB" for name, size in grown.items())
            + ".",
        ]
        if drift := found.get("drift"):
            same = "the same" if drift["same_argmax"] else "not the same"
            lines.append(
                f"Logits of the last position against a fresh prefill of all tokens: relative RMS {drift['relative_rms']:.2g}, where two prefills in "
                f"steps of different lengths differ by {drift['relative_rms_of_two_prefills']:.2g}; {same} best token."
            )
    if found := result.get("million"):
        long, short = found["long"], found["short"]
        lines += [
            "",
            f"A context of {long['tokens']:,} tokens: prefill {long['prefill_seconds']:.1f} s ({long['prefill_tokens_per_second']:,.0f} tokens/s), state {long['state_bytes'] / 1e9:.2f} GB "
            f"({long['state_bytes_per_token']:,.0f} bytes a token), a step {long['step_ms']:.2f} ms, {found['step_ratio']:.2f} times the one at {short['tokens']:,} tokens.",
        ]
    if found := result.get("serve"):
        part = "" if found["finished"] else " (ended by its time limit)"
        lines += [
            "",
            f"{found['requests']} requests of {found['context']:,} tokens with answers of {found['answer']:,}, really run{part}: {found['tokens_per_second']:,.0f} output tokens/s over "
            f"{found['seconds']:.1f} s; the last of them had its first token after {found['seconds_until_all_have_a_token'] or 0:.1f} s.",
        ]
        if expected := found.get("by_the_formula_of_paper"):
            lines.append(f"The formula of `clsa bench paper` gives {expected:,.0f}.")
    return [*lines, ""]


def _step_row(name: str, row: dict[str, Any]) -> str:
    graph, engine, floor = row["graph_ms"], row["engine_step_ms"], row["floor_ms"]
    return f"| {name} | {graph:.2f} | {engine:.2f} | {floor:.2f} | {floor / graph:.0%} | {row['batch'] / engine * 1e3:,.0f} |"


def _after(rows: list[dict[str, Any]], first: str, then: str) -> dict[int, dict[str, Any]]:
    """The row named `then` that follows a row named `first`, by batch."""
    found = {}
    for before, row in pairwise(rows):
        if before["name"].startswith(first) and row["name"].strip().startswith(then):
            found[int(row["name"].split()[-1])] = row
    return found


if __name__ == "__main__":
    main()
