"""`clsa train`: one stage of training, or several in a row."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from clsa import TrainError
from clsa_cli import options, output

_SECONDS_BETWEEN_LINES = 10.0


def train(
    recipe: Annotated[Path, typer.Option(help="A stage (JSON file), or a folder of stages that follow by name.")],
    data: Annotated[Path, typer.Option(help="A corpus that `python -m clsa.train.data` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics and what a resumed run needs.")],
    model: Annotated[
        str | None, typer.Option(help="The checkpoint to start from, unless the recipe trains from scratch.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option(help="End each stage after this time, its learning-rate decay complete.")
    ] = None,
    backend: options.Backend = "auto",
    device: options.Device = None,
    dtype: Annotated[str, typer.Option(help="What to compute in: bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Train a model: dense, then its index alone, then both together.

    Progress goes to stderr, metrics to OUT/metrics.jsonl, and one JSON object per stage to stdout.
    """
    from clsa.hub import resolve
    from clsa.train.recipes import read_recipe, run_recipe
    from clsa.train.trainer import open_trainer

    stages = read_recipe(recipe)
    start = None if model is None else resolve(model)
    trainer = open_trainer(backend, device, dtype)
    output.note(f"training on {trainer.device}")
    with _Progress() as progress:
        results = run_recipe(
            stages,
            data=data,
            out=out,
            trainer=trainer,
            start=start,
            resume=resume,
            max_minutes=max_minutes,
            report=progress.update,
        )
    if not results:
        raise TrainError(f"every stage in {out} is finished; there is nothing to resume")
    for stage, result in results:
        done = {"stage": stage, "steps": result.steps, "tokens": result.tokens, "seconds": result.seconds}
        output.write_json(done | {"last": dict(result.last)})


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=output.console(stderr=True))
        self._tasks: dict[str, int] = {}
        self._is_terminal = sys.stderr.isatty()
        self._last_line = -_SECONDS_BETWEEN_LINES

    def __enter__(self) -> _Progress:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            self._bar.stop()

    def update(self, stage: str, metrics: Mapping[str, float], progress: float) -> None:
        text = _line(metrics)
        if self._is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=1.0, text="")
            self._bar.update(self._tasks[stage], completed=progress, text=text)  # type: ignore[arg-type]
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or progress >= 1.0:
            self._last_line = time.monotonic()
            output.note(f"{stage} {progress:4.0%} {text}")


def _line(metrics: Mapping[str, float]) -> str:
    parts = [f"step {metrics['step']:.0f}", f"loss {metrics['loss']:.4f}"]
    parts += [f"{name} {metrics[name]:.4f}" for name in ("lm_loss", "kd_loss") if name in metrics]
    if "coverage" in metrics:
        parts.append(f"coverage {metrics['coverage']:.1%}")
    return ", ".join([*parts, f"{metrics['tokens_per_second']:,.0f} tokens/s"])
