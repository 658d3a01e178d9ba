"""`paper`: the paper's throughput and latency tables, all plans in one engine."""

from __future__ import annotations

from clsa.bench.bench import Bench, Params
from clsa.bench.op_cases import OpInputs
from clsa.bench.report import Column, Report, Row
from clsa.bench.runs import op_row
from clsa.bench.steps import decode_row, page_room, prefill_row
from clsa.config import ModelConfig
from clsa.plan import make_plan

COLUMNS = [
    Column("plan", "plan"),
    Column("context", "context", ","),
    Column("batch", "batch", ","),
    Column("prefill_tokens_per_second", "prefill tokens/s", ",.0f"),
    Column("decode_tokens_per_second", "decode tokens/s", ",.1f"),
    Column("decode_ratio", "ratio", ".1f"),
    Column("end_to_end_tokens_per_second", "end to end (extrapolated)", ",.1f"),
    Column("end_to_end_ratio", "ratio", ".1f"),
    *(Column(f"layer_{part}_seconds", f"{part} ms/layer", "ms") for part in ("mlp", "attention", "routing", "total")),
    Column("note", "note"),
]


def bench_paper(bench: Bench, output_share: float) -> Report:
    """Prefill, decode, end to end and the latency of a layer.

    End to end is not run: it is the prefill of `batch` prompts at the measured rate, and then steps that all take the
    time measured at the prompt's length, for `output_share` of that length in tokens each.
    """
    report = bench.report("paper", COLUMNS, tokens_per_step=bench.settings.tokens_per_step, output_share=output_share)
    report.facts["end_to_end"] = "extrapolated from the measured prefill rate and the measured step"
    first: dict[tuple[int, int], Row] = {}
    parts = {}
    for plan in bench.plans:
        params = bench.params(bench.config(plan, page_room(max(bench.settings.contexts))))
        for context in bench.settings.contexts:
            config = bench.config(plan, page_room(context))
            prefill = prefill_row(bench, plan, config, params, context, context)
            for batch in bench.settings.batches:
                row = _throughput(bench, plan, config, params, context, batch, prefill, output_share)
                base = first.setdefault((context, batch), row)
                for name in ("decode", "end_to_end"):
                    row[f"{name}_ratio"] = _ratio(row, base, f"{name}_tokens_per_second")
                report.rows.append(row)
        del params
    for row in report.rows:
        place = row["context"], row["batch"]
        if place not in parts:
            parts[place] = _op_seconds(bench, *place)
            report.wrong += sum(seconds is None for seconds in parts[place].values())
        row.update(layer_latency(bench.config(row["plan"], page_room(row["context"])), parts[place]))
    report.facts.update(bench.ceiling_facts())
    return report


def _throughput(
    bench: Bench,
    plan: str,
    config: ModelConfig,
    params: Params,
    context: int,
    batch: int,
    prefill: Row,
    output_share: float,
) -> Row:
    step = decode_row(bench, plan, config, params, context, batch)
    rate = prefill.get("tokens_per_second")
    outputs = max(1, round(output_share * context))
    end_to_end = None
    if rate:
        end_to_end = batch * outputs / (batch * context / rate + outputs * step["step_seconds"])
    return {
        "plan": plan,
        "context": context,
        "batch": batch,
        "prefill_tokens_per_second": rate,
        "decode_tokens_per_second": step["tokens_per_second"],
        "step_seconds": step["step_seconds"],
        "floor_share": step["floor_share"],
        "output_tokens_each": outputs,
        "end_to_end_tokens_per_second": end_to_end,
        "note": "; ".join(note for note in (prefill["note"], step["note"]) if note),
    }


def _ratio(row: Row, base: Row, key: str) -> float | None:
    return row[key] / base[key] if row[key] and base[key] else None


def _op_seconds(bench: Bench, context: int, batch: int) -> dict[str, float | None]:
    """Seconds of each op of a layer at the plans' common sizes; None where the result was wrong."""
    config = bench.config("clsa", page_room(context))
    names = ("mlp", "select", "gather_attention", "dense_attention", "sliding_attention")
    seconds = {}
    for case in OpInputs(bench.ops, config, bench.dtype, context, batch).cases(names):
        bench.note(f"paper: {case.op}, {context:,} tokens, batch {batch}")
        seconds[case.op] = op_row(bench, config, case, context, batch)["seconds"]
    return seconds


def layer_latency(config: ModelConfig, seconds: dict[str, float | None]) -> Row:
    """Latency of an average layer, from the ops timed apart: feed-forward, attention, routing, and their sum."""
    layers = make_plan(config).layers
    attention = {None: "sliding_attention", "D": "dense_attention", "F": "gather_attention", "S": "gather_attention"}
    used = {
        "mlp": ["mlp"] * len(layers),
        "attention": [attention[layer.route] for layer in layers],
        "routing": ["select" for layer in layers if layer.route == "F"],
    }
    row: Row = {}
    for part, ops in used.items():
        times = [seconds[op] for op in ops]
        row[f"layer_{part}_seconds"] = None if None in times else sum(t for t in times if t) / len(layers)
    parts = list(row.values())
    row["layer_total_seconds"] = None if None in parts else sum(parts)
    return row
