# ruff: noqa: E501  (rows of a table are as long as they are)
"""The sections of docs/performance.md, each from result files that a script of its own has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "h200"
Steps = dict[tuple[str, int, int], dict[str, Any]]


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


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
        "At the batch that fits the card (`clsa bench capacity`):",
        "",
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
        row = of_ops("gather_attention", batch)
        lines.append(
            f"| attention over the selected rows, batch {batch} (`clsa bench ops`) | {row['seconds'] * 1e3:.4f} | {row['floor_seconds'] * 1e3:.4f} | {target} |"
        )
    for batch in (1, 8, 32):
        row = of_ops("dense_attention", batch)
        ms, floor = row["seconds"] * 1e3, row["floor_seconds"] * 1e3
        lines.append(
            f"| dense attention, batch {batch} (`clsa bench ops`) | {ms:.4f} | {floor:.4f} | 85 % of the floor: {floor / 0.85:.3f} |"
        )
    for name, words in (
        ("dense 13 of 16", "13 sequences of 128K in a step of 16"),
        ("dense 1K to 128K, 32", "32 sequences of 1K to 128K"),
        ("dense one 128K, 31 4K", "one sequence of 128K and 31 of 4K"),
    ):
        row = kernels[name]
        lines.append(f"| dense attention, {words} | {row['ms']:.4f} | {row['floor']:.4f} | |")
    for op, words in (("sample", "greedy choice"), ("sample_top_p", "sampling with top-p")):
        for batch in (1, 8, 32):
            row = of_ops(op, batch)
            ms, floor = row["seconds"] * 1e3, row["floor_seconds"] * 1e3
            lines.append(f"| {words}, batch {batch} (`clsa bench ops`) | {ms:.4f} | {floor:.4f} | |")
    return [*lines, "", "![Ops against the ceilings of the machine](roofline.svg)"]


def of_ops(op: str, batch: int) -> dict[str, Any]:
    """Our row of `clsa bench ops`."""
    kind = (op, "clsa", batch)
    found: dict[str, Any] = next(r for r in load("ops")["rows"] if (r["op"], r["by"], r["batch"]) == kind)
    return found


def sanitizer_lines(result: Any) -> list[str]:
    """What `scripts/gpu_sanitize.py` found."""
    rows = result["rows"]
    tools = {
        tool: sum(row["passed"] for row in rows if row["tool"] == tool)
        for tool in dict.fromkeys(row["tool"] for row in rows)
    }
    counted = ", ".join(f"{name} over {count:,} tests" for name, count in tools.items())
    late = ", ".join(f"{row['tool']} of {row['tests']} in {row['which']}" for row in rows if row["errors"] is None)
    late = f" Not finished in its time: {late}." if late else ""
    return [
        "## Memory and races",
        "",
        f"`scripts/gpu_sanitize.py`, {result['device']}: compute-sanitizer's {counted} of the kernels: {sum(row['errors'] or 0 for row in rows)} errors.{late}",
        "",
    ]


def sustained_lines(result: Any) -> list[str]:
    """Steps that last, from `scripts/gpu_sustained.py`."""
    lines = [
        "## For longer",
        "",
        f"`scripts/gpu_sustained.py`, {result['device']}, {result['context']:,} tokens: the engine's steps in a row for many seconds. A card at its limit of power lowers its",
        "clock within half a second, so what is timed for less is faster than what lasts.",
        "",
        "| plan | sequences | ms at first | ms that last | power W | clock MHz | power-limited | J a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['plan']} | {row['batch']} | {row['first_ms']:.3f} | {row['settled_ms']:.3f} | {row['watts']:.0f} | {row['sm_mhz']:,.0f} | "
            f"{row['power_capped_share']:.0%} of the time | {row['joules_per_token']:.3f} |"
        )
    return [*lines, ""]


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


def batch_lines(result: Any) -> list[str]:
    """Many short prompts, from `scripts/gpu_batch.py`."""
    prompts = next(r for r in load("prefill_engine")["rows"] if r["name"] == "prefill 64 x 2K, 8192 a step")
    lines = [
        "## Many short prompts",
        "",
        f"`scripts/gpu_batch.py`: {result['requests']:,} prompts of {result['prompt']:,} tokens with answers of {result['answer'] // 2:,} to {result['answer']:,}, through the engine. The bound is all",
        "prompts at the rate of 64 prompts of 2K alone, and all answers at the rate of a full step without prompts. The first row is the default.",
        "",
        "| sequences together | tokens a step | output tokens/s | bound | share | full step ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        seconds = (
            row["prompt_tokens"] / prompts["tokens_per_second"]
            + row["tokens"] / row["together"] * row["full_step_ms"] / 1e3
        )
        bound = row["tokens"] / seconds
        lines.append(
            f"| {row['together']} | {row['tokens_per_step']:,} | {row['tokens_per_second']:,.0f} | {bound:,.0f} | {row['tokens_per_second'] / bound:.0%} | {row['full_step_ms']:.2f} |"
        )
    return [*lines, ""]


def long_lines(result: Any) -> list[str]:
    """Long runs through the engine, from `scripts/gpu_long.py`; parts that were not run are left out."""
    lines = [
        "## Long runs",
        "",
        f"`scripts/gpu_long.py`, {result['machine']['device']}, through the engine.",
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
