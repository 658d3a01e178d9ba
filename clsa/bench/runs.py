"""`ops`, `decode`, `prefill`, `capacity`: the tables."""

from __future__ import annotations

from dataclasses import replace

from clsa.bench.bench import Bench
from clsa.bench.checks import op_inputs
from clsa.bench.engine import MEMORY_SHARE, free_bytes
from clsa.bench.floors import op_bytes, op_flops
from clsa.bench.op_cases import EACH_CONTEXT, OPS, OpCase
from clsa.bench.peers import OpPeer, op_peers, peers
from clsa.bench.report import Column, Report, Row
from clsa.bench.sizes import plan_config
from clsa.bench.steps import decode_row, page_room, peer_decode_row, peer_prefill_row, prefill_row
from clsa.config import ModelConfig
from clsa.plan import make_plan
from clsa.residency import num_pages
from clsa.sizing import state_bytes

_PLACE = [Column("plan", "plan"), Column("context", "context", ","), Column("batch", "batch", ",")]
_FLOOR = [Column("floor_seconds", "floor ms", "ms"), Column("floor_share", "of floor", "%")]
_NOTE = Column("note", "note")
DECODE_COLUMNS = [
    *_PLACE,
    Column("step_seconds", "step ms", "ms"),
    Column("step_spread", "spread", "%"),
    Column("tokens_per_second", "tokens/s", ",.1f"),
    Column("forward_seconds", "forward ms", "ms"),
    *_FLOOR,
    _NOTE,
]
PREFILL_COLUMNS = [
    Column("plan", "plan"),
    Column("prompts", "prompts", ","),
    Column("prompt_tokens", "tokens each", ","),
    Column("seconds", "seconds", ".3f"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    *_FLOOR,
    _NOTE,
]
OP_COLUMNS = [
    Column("op", "op"),
    Column("by", "by"),
    Column("context", "context", ","),
    Column("batch", "batch", ","),
    Column("seconds", "ms", "ms"),
    Column("spread", "spread", "%"),
    *_FLOOR,
    Column("clock", "clock"),
    _NOTE,
]


def bench_ops(bench: Bench) -> Report:
    """Every op of a decode step, and what others offer for it, against its floor. A wrong result gets no time."""
    report = bench.report("ops", OP_COLUMNS, **bench.ceiling_facts())
    s = bench.settings
    config = bench.config("clsa", max(s.contexts))
    is_float8 = s.kv_dtype or s.index_dtype or s.weight_dtype  # what others offer takes no inputs of that kind
    others = op_peers(bench.ops, bench.dtype, s.device) if s.peers and not is_float8 else []
    for context in s.contexts:
        names = OPS if context == s.contexts[0] else EACH_CONTEXT
        for batch in s.batches:
            for case in op_inputs(bench, config, context, batch).cases(names):
                bench.note(f"ops: {case.op}, {context:,} tokens, batch {batch}")
                report.rows.append(op_row(bench, config, case, context, batch))
                report.rows += [
                    row for peer in others for row in _peer_op_rows(bench, config, peer, case, context, batch)
                ]
    report.wrong = sum("wrong" in row and row["by"] == "clsa" for row in report.rows)
    return report


def op_row(bench: Bench, config: ModelConfig, case: OpCase, context: int, batch: int, by: str = "clsa") -> Row:
    """Check an op, then time it. A wrong one is not timed: its row has `wrong` and no seconds."""
    row: Row = {"op": case.op, "by": by, "context": context, "batch": batch, "seconds": None, "note": case.note}
    wrong = case.gate(case.run(0))
    if by == "clsa":
        bench.checked[case.op, context, batch, 1] = wrong
    if wrong:
        return row | {"wrong": wrong, "note": f"WRONG, not timed: {wrong}"}
    times = bench.stopwatch.time(case.run, case.num_inputs)
    moved = op_bytes(case.op, config, context, batch, bench.itemsize, bench.stored, bench.weight_dtype)
    floor = moved / bench.ceilings.read
    return row | {
        "seconds": times.median,
        "spread": times.spread,
        "samples": len(times.samples),
        "input_sets": case.num_inputs,
        "floor_bytes": moved,
        "flops": op_flops(case.op, config, context, batch),
        "floor_seconds": floor,
        "floor_share": floor / times.median,
        "clock": times.clock,
    }


def _peer_op_rows(bench: Bench, config: ModelConfig, peer: OpPeer, case: OpCase, context: int, batch: int) -> list[Row]:
    """The same with somebody else's op on the same inputs; no row if it has none, no time if its inputs don't fit."""
    try:
        calls = [peer.prepare(case.op, arguments) for arguments in case.arguments]
    except MemoryError as error:
        return [{"op": case.op, "by": peer.name, "context": context, "batch": batch, "note": str(error)}]
    if None in calls:
        return []
    theirs = replace(case, call=lambda call: call(), arguments=[(call,) for call in calls])
    return [op_row(bench, config, theirs, context, batch, peer.name)]


def bench_decode(bench: Bench) -> Report:
    """Decode steps of every plan, context and batch, and of the peers."""
    report = bench.report("decode", DECODE_COLUMNS, **bench.ceiling_facts())
    s = bench.settings
    longest = page_room(max(s.contexts))
    for plan in bench.plans:
        params = bench.params(bench.config(plan, longest))
        for context in s.contexts:
            config = bench.config(plan, page_room(context))
            report.rows += [decode_row(bench, plan, config, params, context, batch) for batch in s.batches]
        del params
    if s.peers and s.model is None:
        for peer in peers(bench.ops, plan_config(s.sizes, "transformer", longest), bench.dtype, s.device):
            report.rows += [peer_decode_row(bench, peer, c, b) for c in s.contexts for b in s.batches]
    report.wrong = sum("wrong" in row for row in report.rows)
    return report


def bench_prefill(bench: Bench, short: int) -> Report:
    """One prompt of each length, and the same tokens as prompts of `short` tokens, of every plan and the peers."""
    report = bench.report("prefill", PREFILL_COLUMNS, tokens_per_step=bench.settings.tokens_per_step)
    report.facts.update(bench.ceiling_facts())
    s = bench.settings
    shapes = [(tokens, length) for tokens in s.contexts for length in dict.fromkeys((tokens, min(short, tokens)))]
    longest = page_room(max(s.contexts))
    for plan in bench.plans:
        config = bench.config(plan, longest)
        params = bench.params(config)
        report.rows += [prefill_row(bench, plan, config, params, *shape) for shape in shapes]
        del params
    if s.peers and s.model is None:
        for peer in peers(bench.ops, plan_config(s.sizes, "transformer", longest), bench.dtype, s.device):
            report.rows += [peer_prefill_row(bench, peer, *shape) for shape in shapes]
    report.wrong = sum("wrong" in row for row in report.rows)
    return report


def bench_capacity(bench: Bench, max_batch: int) -> Report:
    """Decode at the largest batch up to `max_batch` that fits beside the weights, of every plan and context."""
    columns = [*DECODE_COLUMNS[:-1], Column("state_bytes", "state GB", "GB"), Column("ratio", "ratio", ".1f"), _NOTE]
    report = bench.report("capacity", columns, memory_share=MEMORY_SHARE, max_batch=max_batch)
    report.facts.update(bench.ceiling_facts())
    first: dict[int, float] = {}  # tokens per second of the first plan, by context
    for plan in bench.plans:
        params = bench.params(bench.config(plan, page_room(max(bench.settings.contexts))))
        for context in bench.settings.contexts:
            config = bench.config(plan, page_room(context))
            batch = min(max_batch, capacity(bench, config))
            if not batch:
                report.rows.append({"plan": plan, "context": context, "batch": 0, "note": "does not fit"})
                continue
            row = decode_row(bench, plan, config, params, context, batch)
            row["state_bytes"] = _bytes_each(bench, config) * batch
            if rate := row["tokens_per_second"]:
                row["ratio"] = rate / first.setdefault(context, rate)
            report.rows.append(row)
        del params
    report.wrong = sum("wrong" in row for row in report.rows)
    return report


def capacity(bench: Bench, config: ModelConfig) -> int:
    """Sequences of the config's full length that fit into the memory that is free now."""
    budget = int(MEMORY_SHARE * free_bytes(bench.ops))
    return budget // _bytes_each(bench, config)


def _bytes_each(bench: Bench, config: ModelConfig) -> int:
    pages = num_pages(config.max_position_embeddings)
    return state_bytes(bench.ops, make_plan(config), bench.dtype, pages, 1, bench.stored)
