"""`paper`: the paper's throughput and latency tables, all plans in one engine."""

from __future__ import annotations

from clsa.bench.bench import Bench
from clsa.bench.checks import op_inputs
from clsa.bench.report import Column, Report, Row
from clsa.bench.runs import op_row
from clsa.bench.steps import decode_row, page_room, prefill_row
from clsa.config import ModelConfig
from clsa.plan import make_plan

END_TO_END = (
    "batch * answer / (batch * context / prefill rate + answer * (first step + last step) / 2), extrapolated: the "
    "prefill rate of one prompt and both steps are measured"
)
COLUMNS = [
    Column("plan", "plan"),
    Column("context", "context", ","),
    Column("batch", "batch", ","),
    Column("prefill_tokens_per_second", "prefill tokens/s", ",.0f"),
    Column("decode_tokens_per_second", "decode tokens/s", ",.1f"),
    Column("decode_ratio", "ratio", ".1f"),
    Column("answer", "answer", ","),
    Column("end_to_end_tokens_per_second", "end to end (extrapolated)", ",.1f"),
    Column("end_to_end_ratio", "ratio", ".1f"),
    *(Column(f"layer_{part}_seconds", f"{part} ms/layer", "ms") for part in ("mlp", "attention", "routing", "total")),
    Column("note", "note"),
]


def bench_paper(bench: Bench, output_share: float) -> Report:
    """Prefill, decode, end to end and the latency of a layer.

    End to end is not run: `end_to_end` says what it follows from, for answers of `output_share` of the prompt's length.
    """
    report = bench.report("paper", COLUMNS, tokens_per_step=bench.settings.tokens_per_step, output_share=output_share)
    report.facts["end_to_end"] = END_TO_END
    s = bench.settings
    parts = {(context, batch): _op_seconds(bench, context, batch) for context in s.contexts for batch in s.batches}
    first: dict[tuple[int, int], Row] = {}
    for plan in bench.plans:
        params = bench.params(bench.config(plan, page_room(max(s.contexts))))
        for context in s.contexts:
            answer = max(1, round(output_share * context))
            config = bench.config(plan, page_room(context, answer))
            prefill = prefill_row(bench, plan, config, params, context, context)
            for batch in s.batches:
                row = _throughput(prefill, decode_row(bench, plan, config, params, context, batch, answer), answer)
                base = first.setdefault((context, batch), row)
                for name in ("decode", "end_to_end"):
                    row[f"{name}_ratio"] = _ratio(row, base, f"{name}_tokens_per_second")
                report.rows.append(row | layer_latency(config, parts[context, batch]))
        del params
    report.wrong = sum("wrong" in row for row in report.rows)
    report.wrong += sum(seconds is None for ops in parts.values() for seconds in ops.values())
    report.facts.update(bench.ceiling_facts())
    return report


def _throughput(prefill: Row, step: Row, answer: int) -> Row:
    rate = prefill.get("tokens_per_second")
    steps = [step.get(key) for key in ("step_seconds", "end_step_seconds")]
    row = {key: step[key] for key in ("plan", "context", "batch")}
    row |= {key: found[key] for found in (prefill, step) for key in ("wrong",) if key in found}
    return row | {
        "prefill_tokens_per_second": rate,
        "decode_tokens_per_second": step["tokens_per_second"],
        "step_seconds": steps[0],
        "end_step_seconds": steps[1],
        "floor_share": step.get("floor_share"),
        "answer": answer,
        "end_to_end_tokens_per_second": end_to_end(step["batch"], step["context"], answer, rate, *steps),
        "note": "; ".join(note for note in (prefill["note"], step["note"]) if note),
    }


def end_to_end(
    batch: int, context: int, answer: int, rate: float | None, first_step: float | None, last_step: float | None
) -> float | None:
    """Output tokens per second of prompts and answers together, see `END_TO_END`; None where a part is missing.

    `rate` of prefill in tokens per second, steps in seconds.
    """
    if not rate or first_step is None or last_step is None:
        return None
    return batch * answer / (batch * context / rate + answer * (first_step + last_step) / 2)


def _ratio(row: Row, base: Row, key: str) -> float | None:
    return row[key] / base[key] if row[key] and base[key] else None


def _op_seconds(bench: Bench, context: int, batch: int) -> dict[str, float | None]:
    """Seconds of each op of a layer at the plans' common sizes; None where the result was wrong."""
    config = bench.config("clsa", page_room(context))
    names = ("close_layer", "select", "gather_attention", "dense_attention", "attend_window")
    seconds = {}
    for case in op_inputs(bench, config, context, batch).cases(names):
        bench.note(f"paper: {case.op}, {context:,} tokens, batch {batch}")
        seconds[case.op] = op_row(bench, config, case, context, batch)["seconds"]
    return seconds


def layer_latency(config: ModelConfig, seconds: dict[str, float | None]) -> Row:
    """Latency of an average layer, from the ops timed apart: feed-forward (with the output projection),
    attention, routing, and their sum."""
    layers = make_plan(config).layers
    attention = {None: "attend_window", "D": "dense_attention", "F": "gather_attention", "S": "gather_attention"}
    used = {
        "mlp": ["close_layer"] * len(layers),
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
