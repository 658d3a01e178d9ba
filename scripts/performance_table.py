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
INTRO = """# Speed

Written by `python scripts/performance_table.py` from `benchmarks/results/h200/`; do not edit. One NVIDIA H200, bfloat16, torch
2.11, triton 3.6, the paper's 4B sizes with a vocabulary of 151,936, random weights and state, exact top-k. Whole steps run from token to
sampled token as one CUDA graph (`scripts/gpu_decode.py`); kernels are timed in graphs over rotating inputs after
their checks passed (`scripts/gpu_check.py`). Floors are the bytes that must move over the read rate measured in the same run.
"""
CONCLUSION = """
The Transformer's 275 GB of K and V at batch 32 do not fit a card. With page tables shared by all 32 sequences its step was measured
at {aliased:.1f} ms, which flatters it: one copy of the pages comes out of the L2 cache for all. With the dense kernel's own figure over
distinct pages ({dense:.3f} ms a layer) and the rest of the step as measured for CLSA without routing and selected rows, a step is at
least {composed:.1f} ms, {ratio:.1f} times CLSA's. The target was 20.

What is missed, and why: the step of a small batch is a chain of {launches} launches; a small product starts and ends with an idle
memory ({mb:.1f} MB take {small:.4f} ms with the best tiles, {small_rate:.1f} TB/s, where the head's {head_mb:.0f} MB reach {head_rate:.1f}). What would help is fewer, longer
kernels: a whole layer's products in one persistent kernel. Selection at batch 1 is bound by `pick`, one program per row ({pick:.4f} ms).
"""


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    steps = {(row["plan"], row["context"], row["batch"]): row for row in load("decode_4")["rows"]}
    steps |= {(row["plan"], row["context"], row["batch"]): row for row in load("decode_4_baselines")["rows"]}
    lengths = {(row["context"], row["batch"]): row for row in load("decode_3_lengths")["rows"]}
    kernels = {row["name"].strip(): row for row in load("kernels_3")["rows"] if "ms" in row}
    gathers = _after(load("kernels_3")["rows"], "gather in place", "16 layers")
    lines = [
        INTRO,
        "| decode step, 128K | graph ms | engine step ms | floor ms | share | tokens/s | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, target in ((1, "<= 1.7 ms"), (8, ""), (32, "<= 2.8 ms, >= 11,400 tokens/s")):
        row = steps["clsa", 131072, batch]
        lines.append(_step_row(f"CLSA, batch {batch}", row, target))
    for plan, name in (("yoco", "YOCO dense"), ("transformer", "Transformer")):
        lines.append(_step_row(f"{name}, batch 1", steps[plan, 131072, 1], ""))
    lines += ["", "| CLSA by context (earlier run) | graph ms, batch 1 | graph ms, batch 32 |", "|---|---|---|"]
    for context in (8192, 32768, 1048576):
        one, many = lengths[context, 1], lengths[context, 32]
        lines.append(f"| {context:,} | {one['graph_ms']:.2f} | {many['graph_ms']:.2f} |")
    ratio = lengths[1048576, 1]["graph_ms"] / lengths[8192, 1]["graph_ms"]
    lines += ["", f"A step at 1M tokens takes {ratio:.2f} times the step at 8K (batch 1; the target was 1.2)."]
    lines += ["", "| one kernel, 128K | ms | floor ms | target ms |", "|---|---|---|---|"]
    for batch, target in ((1, "0.030"), (8, ""), (32, "0.300")):
        row = kernels[f"select        batch {batch:2d} context 128K"]
        lines.append(f"| routing (scores and top-k), batch {batch} | {row['ms']:.4f} | {row['floor']:.4f} | {target} |")
    for batch, target in ((1, "0.010"), (8, "0.018"), (32, "0.040")):
        row = gathers[batch]
        lines.append(
            f"| attention over the selected rows, a layer of 16, batch {batch} | {row['ms']:.4f} | {row['floor']:.4f} | {target} |"
        )
    dense = {
        row["name"].split()[-1]: row
        for row in load("kernels_4")["rows"]
        if row["name"].startswith("dense") and "ms" in row
    }
    for batch in (1, 8, 32):
        row = dense[str(batch)]
        lines.append(
            f"| dense attention, batch {batch} | {row['ms']:.4f} | {row['floor']:.4f} | 85 % of the floor: {row['floor'] / 0.85:.3f} |"
        )
    clsa = steps["clsa", 131072, 32]["graph_ms"]
    rest = clsa - kernels["select        batch 32 context 128K"]["ms"] - 16 * gathers[32]["ms"]
    composed = 32 * dense["32"]["ms"] + rest
    aliased = steps["transformer", 131072, 32]["graph_ms"]
    products = {(row["what"], row["rows"]): row for row in load("linear_1")}
    small, head = products["q or o", 1], products["head", 1]
    small_ms, head_ms = small["best"][0][0], head["best"][0][0]
    figures = {
        "launches": sum(count for _, _, count in steps["clsa", 131072, 1]["kernels"]),
        "mb": small["mb"],
        "small": small_ms,
        "small_rate": small["mb"] / small_ms / 1e3,
        "head_mb": head["mb"],
        "head_rate": head["mb"] / head_ms / 1e3,
        "pick": kernels["pick        batch  1 context 128K"]["ms"],
    }
    lines.append(
        CONCLUSION.format(**figures, aliased=aliased, dense=dense["32"]["ms"], composed=composed, ratio=composed / clsa)
    )
    for name, section in (("profile", profile_lines), ("long", long_lines)):
        if (RESULTS / f"{name}.json").exists():
            lines += section(load(name))
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    parser.parse_args().out.write_text("\n".join(lines), encoding="utf-8")


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
    lines = ["## Long runs", "", f"`scripts/gpu_long.py`, {result['machine']['device']}, through the engine."]
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


def _step_row(name: str, row: dict[str, Any], target: str) -> str:
    graph, engine, floor = row["graph_ms"], row["engine_step_ms"], row["floor_ms"]
    return f"| {name} | {graph:.2f} | {engine:.2f} | {floor:.2f} | {floor / graph:.0%} | {row['batch'] / engine * 1e3:,.0f} | {target} |"


def _after(rows: list[dict[str, Any]], first: str, then: str) -> dict[int, dict[str, Any]]:
    """The row named `then` that follows a row named `first`, by batch."""
    found = {}
    for before, row in pairwise(rows):
        if before["name"].startswith(first) and row["name"].strip().startswith(then):
            found[int(row["name"].split()[-1])] = row
    return found


if __name__ == "__main__":
    main()
