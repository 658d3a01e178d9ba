"""`clsa eval`: held-out cross-entropy by context length, and what the selection covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clsa import RequestError, TrainError
from clsa_cli import options, output


def eval_(
    model: options.Model,
    data: Annotated[Path, typer.Option(help="A corpus that `python -m clsa.train.data` wrote.")],
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, with commas between.")] = "1024,2048,4096",
    against: Annotated[str | None, typer.Option(help="A second model, scored on the same windows.")] = None,
    result_file: Annotated[Path | None, typer.Option("--output", help="Also write the result to this file.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens scored at once.")] = 8192,
    max_windows: Annotated[int | None, typer.Option(help="At most this many windows per length.")] = None,
    backend: options.Backend = "auto",
    device: options.Device = None,
    dtype: Annotated[str, typer.Option(help="What to compute in: float32 or bfloat16.")] = "float32",
) -> None:
    """Measure cross-entropy on held-out text, as the checkpoint is and with dense attention, and the coverage.

    Prints a table and then one JSON line. Coverage is the share of the dense attention mass that the selected tokens
    hold: over all positions, and over those that see more tokens than are selected.
    """
    from clsa.evaluate.held_out import evaluate
    from clsa.hub import resolve
    from clsa.train.trainer import open_trainer

    wanted = _lengths(lengths)
    trainer = open_trainer(backend, device, dtype)
    output.note(f"evaluating on {trainer.device}")
    rows = evaluate(
        [resolve(name) for name in (model, against) if name is not None],
        data=data,
        lengths=wanted,
        trainer=trainer,
        batch_tokens=batch_tokens,
        max_windows=max_windows,
        report=output.note,
    )
    result = {"data": str(data), "device": trainer.device, "dtype": dtype, "rows": rows}
    _show(rows)
    if result_file is not None:
        try:
            result_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise TrainError(f"{result_file} cannot be written: {error.strerror}") from error
    output.write_json(result)


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"--lengths must be integers with commas between, such as 1024,2048, got {text!r}") from None


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table()
    for name in ("model", "attention", "length", "tokens", "cross-entropy", "coverage", "coverage beyond k"):
        table.add_column(name, justify="left" if name in ("model", "attention") else "right")
    for row in rows:
        for mode in ("dense", "sparse"):
            if scores := row.get(mode):
                shares = (scores.get(key) for key in ("coverage", "coverage_from_k"))
                table.add_row(
                    row["model"],
                    mode,
                    f"{row['length']:,}",
                    f"{row['tokens']:,}",
                    f"{scores['loss']:.4f}",
                    *("-" if share is None else f"{share:.1%}" for share in shares),
                )
    output.console().print(table)
