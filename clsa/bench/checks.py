"""The gate before every figure of whole steps: the plan's step, and its ops at the figure's own sizes."""

from __future__ import annotations

from clsa.bench.bench import Bench
from clsa.bench.op_cases import OpInputs
from clsa.bench.step_gate import step_gate
from clsa.config import ModelConfig
from clsa.plan import make_plan

_OPS = {"D": ("dense_attention",), "F": ("select", "gather_attention"), "S": ("gather_attention",)}
_CHUNK = 256  # queries of a prefill step that are enough to have all kinds of tiles


def wrong_decode(bench: Bench, name: str, config: ModelConfig, context: int, batch: int) -> str | None:
    """What is wrong with decode steps of this plan at this context and batch; None if nothing is."""
    names = {op for layer in make_plan(config).layers if layer.route for op in _OPS[layer.route]}
    return _wrong_plan(bench, name, config) or _wrong_ops(bench, config, names, context, batch, 1)


def wrong_prefill(bench: Bench, name: str, config: ModelConfig, length: int) -> str | None:
    """The same of prefill steps at the end of a prompt of this length."""
    names = {op for layer in make_plan(config).layers if layer.route for op in _OPS[layer.route]}
    chunk = min(_CHUNK, length, bench.settings.tokens_per_step)
    # In the one shared memory of cross layers only the last position of a prompt asks.
    names &= {"dense_attention", "select"} if "full_attention" in config.layer_types else set()
    return _wrong_plan(bench, name, config) or _wrong_ops(bench, config, names, length, 1, chunk)


def _wrong_plan(bench: Bench, name: str, config: ModelConfig) -> str | None:
    key = ("step", name)
    if key not in bench.checked:
        bench.note(f"checking a step of {name}")
        bench.checked[key] = step_gate(bench.ops, config, bench.dtype, bench.stored, bench.weight_dtype)
    wrong = bench.checked[key]
    return wrong and f"a step of {name}, {wrong}"


def _wrong_ops(bench: Bench, config: ModelConfig, names: set[str], context: int, batch: int, chunk: int) -> str | None:
    missing = tuple(op for op in sorted(names) if (op, context, batch, chunk) not in bench.checked)
    inputs = op_inputs(bench, config, context, batch, chunk=chunk, max_sets=1)
    for case in inputs.cases(missing):
        bench.note(f"checking {case.op}, {context:,} tokens, batch {batch}")
        bench.checked[case.op, context, batch, chunk] = case.gate(case.run(0))
    found = {op: bench.checked[op, context, batch, chunk] for op in sorted(names)}
    return next((f"{op}, {wrong}" for op, wrong in found.items() if wrong), None)


def op_inputs(bench: Bench, config: ModelConfig, context: int, batch: int, **sizes: int) -> OpInputs:
    """Inputs of ops as this run stores them; `sizes` are those of `OpInputs`."""
    return OpInputs(bench.ops, config, bench.dtype, context, batch, bench.stored, bench.weight_dtype, **sizes)
