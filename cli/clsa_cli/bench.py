"""`clsa bench`: tables, then one JSON line, and a result file on request."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from clsa import ClsaError, RequestError
from clsa_cli import options, output

if TYPE_CHECKING:
    from clsa.bench.bench import Bench
    from clsa.bench.report import Column, Report

_WHAT = "What is measured"
_HOW = "How"

bench = typer.Typer(
    no_args_is_help=True, help="Measure speed against the machine's floor; each prints a table and JSON."
)

Output = Annotated[Path | None, typer.Option(help="Also write the result to this file.", rich_help_panel=_HOW)]
Plot = Annotated[
    Path | None, typer.Option("--plot", help="Also draw the result to this .svg, .png or .pdf.", rich_help_panel=_HOW)
]


def _settings(
    backend: options.Backend = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    kv_dtype: options.KvDtype = None,
    index_dtype: options.IndexDtype = None,
    weight_dtype: options.WeightDtype = None,
    sizes: Annotated[
        str, typer.Option(help="Random weights of these sizes: 4b, 0.2b, demo, tiny.", rich_help_panel=_WHAT)
    ] = "4b",
    model: Annotated[
        str | None, typer.Option(help="A checkpoint in place of --sizes and --plans.", rich_help_panel=_WHAT)
    ] = None,
    contexts: Annotated[
        str, typer.Option(help="Tokens of context, with commas between.", rich_help_panel=_WHAT)
    ] = "8192,32768,131072",
    batches: Annotated[
        str, typer.Option(help="Sequences of a step, with commas between.", rich_help_panel=_WHAT)
    ] = "1,8,32",
    plans: Annotated[
        str, typer.Option(help="Layer plans, with commas between.", rich_help_panel=_WHAT)
    ] = "transformer,yoco,dsa,indexcache,clsa",
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a prefill step.", rich_help_panel=_WHAT)] = 2048,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time peers too.", rich_help_panel=_WHAT)] = True,
    seconds: Annotated[float, typer.Option(help="Seconds for each figure.", rich_help_panel=_HOW)] = 2.0,
) -> Bench:
    from clsa.bench.bench import Bench, Settings

    settings = Settings(
        backend=backend,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        weight_dtype=weight_dtype,
        sizes=sizes,
        model=model,
        contexts=_integers("--contexts", contexts),
        batches=_integers("--batches", batches),
        plans=tuple(plans.split(",")),
        seconds=seconds,
        tokens_per_step=tokens_per_step,
        peers=peers,
    )
    return Bench(settings, output.note)


def _command(function: Callable[..., Report]) -> Callable[..., Report]:
    """Register a command whose first parameter, a Bench, is made of the common options."""
    shared = inspect.signature(_settings).parameters
    own = {name: parameter for name, parameter in inspect.signature(function).parameters.items() if name != "made"}

    @functools.wraps(function)
    def command(*, output: Path | None, picture: Path | None, **given: Any) -> None:
        from clsa.bench.plots import check_plot

        if picture is not None:
            check_plot(picture)
        made = _settings(**{name: given.pop(name) for name in shared})
        finish(function(made, **given), output, picture)

    where = [inspect.Parameter(x, inspect.Parameter.KEYWORD_ONLY, default=None) for x in ("output", "picture")]
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own.values(), *shared.values())] + where
    hints = get_type_hints(function, _names(), include_extras=True) | get_type_hints(
        _settings, _names(), include_extras=True
    )
    hints |= {"output": Output, "picture": Plot, "return": None}
    hints.pop("made", None)
    command.__annotations__ = hints
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(annotation=hints[p.name]) for p in parameters]
    )
    del command.__wrapped__
    bench.command(function.__name__)(command)
    return function


def _names() -> dict[str, Any]:
    """What the annotations of commands refer to but nothing here imports."""
    return globals() | {"Bench": Any, "Report": Any}


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"{option} must be integers with commas between, such as 1,8,32, got {text!r}") from None


@_command
def ops(made: Bench) -> Report:
    """Each op of a decode step against its floor; one whose result is wrong is not timed."""
    from clsa.bench.runs import bench_ops

    return bench_ops(made)


@_command
def decode(made: Bench) -> Report:
    """Decode steps of the engine at each context and batch, against the bytes they must move."""
    from clsa.bench.runs import bench_decode

    return bench_decode(made)


@_command
def prefill(
    made: Bench,
    short: Annotated[int, typer.Option(help="Tokens of each of the short prompts.", rich_help_panel=_WHAT)] = 2048,
) -> Report:
    """One long prompt, and the same tokens as many short ones."""
    from clsa.bench.runs import bench_prefill
    from clsa.config import MAX_TOKENS, check_int

    return bench_prefill(made, check_int("--short", short, 1, MAX_TOKENS, RequestError))


@_command
def serve(
    made: Bench,
    requests: Annotated[int, typer.Option(help="Requests that arrive.", rich_help_panel=_WHAT)] = 64,
    input_tokens: Annotated[int, typer.Option(help="Mean length of a prompt.", rich_help_panel=_WHAT)] = 1024,
    output_tokens: Annotated[int, typer.Option(help="Mean length of an answer.", rich_help_panel=_WHAT)] = 128,
    rate: Annotated[
        float, typer.Option(help="Arrivals per second (Poisson); 0: all at once.", rich_help_panel=_WHAT)
    ] = 0.0,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run together.", rich_help_panel=_WHAT)] = 32,
) -> Report:
    """Requests over the shared engine as they arrive: latencies and throughput. Contexts and batches don't matter."""
    from clsa.bench.serve import Load, bench_serve

    load = Load(
        requests=requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        rate=rate,
        max_num_seqs=max_num_seqs,
    )
    return bench_serve(made, load)


@_command
def paper(
    made: Bench,
    output_share: Annotated[
        float, typer.Option(help="Answer length of the end-to-end figure, per prompt token.", rich_help_panel=_WHAT)
    ] = 0.08,
) -> Report:
    """The paper's tables: prefill, decode, end to end (extrapolated) and the latency of a layer."""
    from clsa.bench.paper import bench_paper
    from clsa.config import check_float

    return bench_paper(made, check_float("--output-share", output_share, 1e-6, 100.0, RequestError))


@_command
def capacity(
    made: Bench,
    max_batch: Annotated[int, typer.Option(help="Sequences at most.", rich_help_panel=_WHAT)] = 4096,
) -> Report:
    """Decode at the batch that fits the memory, each plan with its own. Batches don't matter."""
    from clsa.bench.runs import bench_capacity
    from clsa.config import check_int

    return bench_capacity(made, check_int("--max-batch", max_batch, 1, 4096, RequestError))


@bench.command("plot")
def plot(
    result: Annotated[Path, typer.Argument(help="A file that --output of a command here wrote.", show_default=False)],
    picture: Annotated[Path, typer.Option("--plot", help="The .svg, .png or .pdf to draw.", show_default=False)],
) -> None:
    """Draw a result file: bars of throughput, stacked latency, or a roofline."""
    from clsa.bench.plots import check_plot, draw, read_result

    check_plot(picture)
    draw(read_result(result), picture)
    output.note(f"drew {picture}")


@bench.command("scheduler")
def scheduler(
    running: Annotated[int, typer.Option(help="Requests that run.")] = 32,
    waiting: Annotated[int, typer.Option(help="Requests that wait.")] = 10_000,
    steps: Annotated[int, typer.Option(help="Steps to time.")] = 5000,
    output: Output = None,
) -> None:
    """What a step costs the host before any array is made."""
    from clsa.bench.scheduler import bench_scheduler

    finish(bench_scheduler(running, waiting, steps), output, None)


def finish(report: Report, path: Path | None, picture: Path | None) -> None:
    """Print the table and the JSON line, write the file, draw. Exit code 1 if a result was wrong."""
    from clsa.bench.plots import draw
    from clsa.bench.report import result

    content = result(report, ["clsa", *sys.argv[1:]])
    _show(report)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ClsaError(f"{path} cannot be written: {error.strerror}") from error
    output.write_json(content)
    if report.wrong:
        output.error(f"{output.count(report.wrong, 'result')} did not agree with the specification")
        raise typer.Exit(1)
    if picture is not None:
        draw(content, picture)


def _show(report: Report) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = [column for column in report.columns if any(row.get(column.key) not in (None, "") for row in report.rows)]
    for column in shown:
        table.add_column(column.title, justify="right" if column.form else "left")
    for row in report.rows:
        table.add_row(*(_cell(row.get(column.key), column) for column in shown))
    output.console().print(table)
    for line in _footer(report):
        output.note(line)


def _cell(value: Any, column: Column) -> str:
    if value is None or value == "":
        return "-" if column.form else ""
    scales = {"ms": (1e3, ".3f"), "us": (1e6, ".1f"), "GB": (1e-9, ".2f"), "%": (1.0, ".1%")}
    scale, form = scales.get(column.form, (1, column.form))
    return format(value * scale if scale != 1 else value, form) if form else output.one_line(str(value))


def _footer(report: Report) -> Sequence[str]:
    facts, machine = report.facts, report.facts["machine"]
    lines = [f"{machine['device']}; {machine['host']}, load average {machine['load_average']}"]
    if "dtype" in facts:
        lines.append(f"{facts['sizes']}, {facts['dtype']}, weights {facts['weights']}; state is random data")
        kept = {"K and V": facts["kv_dtype"], "index keys": facts["index_dtype"], "weights": facts["weight_dtype"]}
        if in_bytes := [f"{what} in {dtype}" for what, dtype in kept.items() if dtype]:
            lines.append(", ".join(in_bytes))
    if ceilings := facts.get("ceilings"):
        lines.append(
            f"ceilings: read {ceilings['read_bytes_per_second'] / 1e9:,.1f} GB/s (by {ceilings['read_by']}), "
            f"matrix products {ceilings['matmul_flop_per_second'] / 1e12:,.3f} TFLOP/s"
        )
    if any((row.get("floor_share") or 0) > 1 for row in report.rows):
        lines.append(
            "of floor above 100%: the data fit a cache, or the host was busier when its ceilings were measured"
        )
    return lines
