"""Pictures of result files in the manner of the paper's: bars of throughput, stacked latency, a roofline.

matplotlib is imported when a picture is asked for and not before. An SVG keeps its words as text, and the same
result gives the same file.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from clsa.bench.plot_parts import PARTS, bars, colours, distinct, finish, number, ratio_mark, table_of, tokens
from clsa.bench.report import Row
from clsa.config import show
from clsa.errors import ClsaError, RequestError

SUFFIXES = (".svg", ".png", ".pdf")
MAX_RESULT_BYTES = 64 << 20
MAX_ROWS = 4096

_OPS = {
    "select": ("o", "#e69f00"),
    "gather_attention": ("s", "#0072b2"),
    "dense_attention": ("D", "#7f7f7f"),
    "attend_window": ("^", "#56b4e9"),
    "sliding_attention": ("^", "#56b4e9"),  # in results from before attend_window was timed
    "linear": ("v", "#009e73"),
    "close_layer": ("P", "#d55e00"),
    "lm_head": ("X", "#cc79a7"),
}
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "clsa",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.titlesize": 9,
}

Drawing = Callable[[Any, Row], None]  # onto a matplotlib figure


def check_plot(path: Path) -> Path:
    """Refuse, before anything is measured, what could not be drawn. Raises RequestError or ClsaError."""
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"--plot must end in {', '.join(SUFFIXES)}, got {path.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ClsaError('a picture needs matplotlib, which is not installed: pip install "clsa[bench]"')
    return path


def read_result(path: Path) -> Row:
    """The content of a result file that can be drawn. Raises RequestError on anything else."""
    try:
        if path.stat().st_size > MAX_RESULT_BYTES:
            raise RequestError(f"{path} is larger than the {MAX_RESULT_BYTES >> 20} MB that a result file may have")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise RequestError(f"{path} is not a JSON file") from None
    name = content.get("benchmark") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in DRAWN:
        raise RequestError(f"{path} must be the result of clsa bench {', '.join(DRAWN)}, got {show(name)}")
    rows = content.get("rows")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_ROWS or not all(isinstance(row, dict) for row in rows):
        raise RequestError(f"rows of {path} must be a list of 1 to {MAX_ROWS} objects")
    return cast(Row, content)


def draw(result: Row, path: Path) -> None:
    """Draw the content of a result file to `path`. Raises RequestError where it has no figure to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    check_plot(path)
    with rc_context(_STYLE):
        figure = Figure(layout="constrained")
        DRAWN[result["benchmark"]](figure, result)
        figure.suptitle(_title(result), fontsize=9, x=0.01, ha="left")
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata=metadata, dpi=160)
        except OSError as error:
            raise ClsaError(f"{path} cannot be written: {error.strerror}") from error


def _title(result: Row) -> str:
    machine = result.get("machine")
    device = machine.get("device") if isinstance(machine, dict) else None
    facts = [device, result.get("sizes"), result.get("dtype"), result.get("date")]
    words = ", ".join(one_line for fact in facts if isinstance(fact, str) and (one_line := " ".join(fact.split())[:80]))
    return f"clsa bench {result['benchmark']}\n{words}"


# -- bars ----------------------------------------------------------------------------------------------------


def _decode(figure: Any, result: Row) -> None:
    rows = result["rows"]
    batches = distinct(rows, "batch", int)
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        own = [row for row in rows if row["batch"] == batch]
        bars(axes, _contexts(own), table_of(own, "context", "tokens_per_second"))
        axes.set(title=f"batch {batch}", xlabel="tokens of context", ylabel="tokens per second")
    finish(figure, panels[0], max(5.0, 3.4 * len(batches)), 3.4)


def _contexts(rows: Sequence[Row]) -> list[str]:
    return [tokens(context) for context in distinct(rows, "context", int)]


def _prefill(figure: Any, result: Row) -> None:
    rows, axes = result["rows"], figure.subplots()
    distinct(rows, "prompts", int), distinct(rows, "prompt_tokens", int)
    shaped = [row | {"shape": f"{row['prompts']} x {tokens(row['prompt_tokens'])}"} for row in rows]
    shapes = distinct(shaped, "shape", str)
    bars(axes, shapes, table_of(shaped, "shape", "tokens_per_second"))
    axes.set(xlabel="prompts x tokens of each", ylabel="prompt tokens per second")
    finish(figure, axes, max(5.0, 1.3 * len(shapes) + 2), 3.4)


def _capacity(figure: Any, result: Row) -> None:
    rows, axes = result["rows"], figure.subplots()
    table, batches = (table_of(rows, "context", key) for key in ("tokens_per_second", "batch"))
    base = next(iter(table.values()))
    marks = {
        name: [f"{ratio_mark(v, b)}\n({n or 0:.0f})" for v, b, n in zip(values, base, batches[name], strict=True)]
        for name, values in table.items()
    }
    bars(axes, _contexts(rows), table, marks)
    axes.set(xlabel="tokens of context (in brackets: sequences that fit the memory)", ylabel="tokens per second")
    finish(figure, axes, max(5.0, 1.6 * len(rows) / len(table) + 2), 3.6)


def _serve(figure: Any, result: Row) -> None:
    rows = result["rows"]
    distinct(rows, "plan", str)
    panels = figure.subplots(1, 4, width_ratios=(1, 2, 2, 2))
    bars(panels[0], ["output"], {row["plan"]: [number(row, "output_tokens_per_second")] for row in rows})
    panels[0].set(ylabel="tokens per second")
    for axes, (key, title) in zip(panels[1:], _LATENCIES.items(), strict=True):
        found = {row["plan"]: [number(row, f"{key}_p{p}") for p in (50, 99)] for row in rows}
        table = {plan: [x and 1e3 * x for x in values] for plan, values in found.items()}
        bars(axes, ["p50", "p99"], table, {plan: [f"{x or 0:.3g}" for x in values] for plan, values in table.items()})
        axes.set(title=title, ylabel="ms")
    finish(figure, panels[0], 12.0, 3.2)


_LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "itl": "between tokens"}


# -- the paper's page ----------------------------------------------------------------------------------------


def _paper(figure: Any, result: Row) -> None:
    """Throughput at the largest batch, and the latency of a layer at the longest context."""
    batch = max(distinct(result["rows"], "batch", int))
    rows = [row for row in result["rows"] if row["batch"] == batch]
    longest = max(distinct(rows, "context", int))
    panels = figure.subplots(2, 2).ravel()
    for axes, (key, title) in zip(panels, _THROUGHPUT.items(), strict=False):
        bars(axes, _contexts(rows), table_of(rows, "context", f"{key}_tokens_per_second"))
        axes.set(title=title.format(batch=batch), xlabel="tokens of context", ylabel="tokens per second")
    _latency(panels[3], [row for row in rows if row["context"] == longest])
    panels[3].set(title=f"a layer of a decode step, {tokens(longest)}, batch {batch}", ylabel="ms")
    finish(figure, panels[0], 9.0, 6.2)


_THROUGHPUT = {
    "prefill": "prefill, one prompt",
    "decode": "decode, batch {batch}",
    "end_to_end": "prompt and answer, batch {batch} (extrapolated)",
}


def _latency(axes: Any, rows: Sequence[Row]) -> None:
    """Bars of one layer's latency, stacked from its parts, the sum on top."""
    plans = list(colours([row["plan"] for row in rows]))
    bottom = [0.0] * len(rows)
    for part, (label, colour) in PARTS.items():
        heights = [1e3 * (number(row, f"layer_{part}_seconds") or 0.0) for row in rows]
        axes.bar(range(len(rows)), heights, 0.6, bottom, color=colour, label=label)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    for x, total in enumerate(bottom):
        axes.annotate(f"{total:.3g}", (x, total), (0, 1.5), textcoords="offset points", ha="center", fontsize=6.5)
    axes.set_xticks(range(len(rows)), [label for _, label, _ in plans], fontsize=7)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.12 * max(bottom) or 1.0)
    axes.legend(fontsize=7)


# -- roofline ------------------------------------------------------------------------------------------------


def _roofline(figure: Any, result: Row) -> None:
    """Each op by what it computes per byte it must move, under the machine's ceilings."""
    from matplotlib.ticker import EngFormatter

    ceilings = result.get("ceilings")
    ceilings = ceilings if isinstance(ceilings, dict) else {}
    read, matmul = (number(ceilings, key) for key in ("read_bytes_per_second", "matmul_flop_per_second"))
    points = list(_points(result["rows"]))
    if not read or not matmul or not points:
        raise RequestError("a roofline needs ceilings, and ops with seconds, flops and floor_bytes; run clsa bench ops")
    axes = figure.subplots()
    low, high = min(x for _, _, x, _ in points) / 2, max(4 * matmul / read, 2 * max(x for _, _, x, _ in points))
    ridge = matmul / read
    axes.plot([low, ridge, high], [low * read, matmul, matmul], color="black", linewidth=1)
    above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right", "fontsize": 7}
    axes.annotate(f"{read / 1e12:.3g} TB/s", (ridge / 2, matmul / 2), **above)
    axes.annotate(f"{matmul / 1e12:.3g} TFLOP/s", (high, matmul), **above)
    batches = sorted({batch for _, batch, _, _ in points})
    for op in dict.fromkeys(op for op, _, _, _ in points):
        own = [point for point in points if point[0] == op]
        marker, colour = _OPS[op]
        sizes = [12 + 60 * (1 + batches.index(batch)) / len(batches) for _, batch, _, _ in own]
        xs, ys = [x for *_, x, _ in own], [y for *_, y in own]
        axes.scatter(xs, ys, sizes, c=colour, marker=marker, label=op, alpha=0.75)
    sizes_mean = f"larger marks: larger batches ({', '.join(map(str, batches))})"
    axes.set(xscale="log", yscale="log", xlabel=f"FLOP per byte that must move; {sizes_mean}", ylabel="FLOP per second")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EngFormatter())
    finish(figure, axes, 7.0, 5.0)


def _points(rows: Sequence[Row]) -> Iterator[tuple[str, int, float, float]]:
    """(op, batch, intensity, rate) of our own ops at their longest context."""
    distinct(rows, "op", str), distinct(rows, "batch", int)
    longest = max((row["context"] for row in rows if isinstance(row.get("context"), int)), default=None)
    for row in rows:
        seconds, flops, moved = (number(row, key) for key in ("seconds", "flops", "floor_bytes"))
        ours = row["op"] in _OPS and row.get("by") == "clsa" and row.get("context") in (None, longest)
        if ours and seconds and flops and moved:
            yield row["op"], row["batch"], flops / moved, flops / seconds


DRAWN: dict[str, Drawing] = {
    "ops": _roofline,
    "decode": _decode,
    "prefill": _prefill,
    "serve": _serve,
    "paper": _paper,
    "capacity": _capacity,
}
