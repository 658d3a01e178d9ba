"""A recipe is a JSON file with one stage, or a folder of them: stages that follow each other by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clsa.checkpoint import CONFIG_FILE
from clsa.errors import TrainError
from clsa.train.config import TrainConfig, read_train_config
from clsa.train.loop import Metrics, Result, run
from clsa.train.trainer import Trainer

Report = Callable[[str, Metrics, float], None]  # stage, metrics, share of it that is done


def read_recipe(path: Path) -> list[tuple[str, TrainConfig]]:
    """Name and config of each stage, in order. Raises TrainError if there is none, ConfigError on a bad one."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise TrainError(f"{path} has no recipe (*.json)")
    return [(file.stem, read_train_config(file)) for file in files]


def run_recipe(
    stages: list[tuple[str, TrainConfig]],
    *,
    data: Path,
    out: Path,
    trainer: Trainer,
    start: Path | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    report: Report = lambda stage, metrics, progress: None,
) -> list[tuple[str, Result]]:
    """Train the stages: one into `out`, several each into a folder of its name there, each from the one before.

    `resume` skips the stages that are finished and goes on in the one that is not. `max_minutes` bounds each stage.
    Returns what was trained. Raises as `clsa.train.loop.run` does.
    """
    results: list[tuple[str, Result]] = []
    for name, config in stages:
        folder = out / name if len(stages) > 1 else out
        if not (resume and len(stages) > 1 and (folder / CONFIG_FILE).is_file()):
            result = run(
                config,
                data=data,
                out=folder,
                trainer=trainer,
                start=start,
                resume=resume and (folder.exists() or len(stages) == 1),
                max_minutes=max_minutes,
                report=lambda metrics, progress, name=name: report(name, metrics, progress),  # type: ignore[misc]
            )
            results.append((name, result))
        start = folder
    return results
