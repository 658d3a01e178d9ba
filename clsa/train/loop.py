"""The training loop of one stage: steps, metrics, snapshots, and a checkpoint at the end.

OUT/metrics.jsonl    one object per logged step          OUT/train.json    the recipe
OUT/resume/          the last snapshot                    OUT/config.json, model.safetensors, tokenizer.json ...
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clsa.checkpoint import find_tokenizer_files, save_checkpoint
from clsa.errors import TrainError
from clsa.files import MAX_JSON_BYTES, read_bounded
from clsa.train.config import TrainConfig
from clsa.train.data import Batches, load_split
from clsa.train.schedule import learning_rate
from clsa.train.snapshot import Snapshot, read_snapshot, write_snapshot
from clsa.train.stages import begin, check_frozen, digests, trainable
from clsa.train.trainer import Trainer, make_forward

METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "train.json"
Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished stage: updates made, tokens read, seconds of training, metrics of the last step."""

    steps: int
    tokens: int
    seconds: float
    last: Metrics


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step the device may still be computing."""

    step: int  # from 1
    lr: float
    is_logged: bool
    read: Callable[[], dict[str, float]]


def run(
    config: TrainConfig,
    *,
    data: Path,
    out: Path,
    trainer: Trainer,
    start: Path | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    report: Callable[[Metrics, float], None] = lambda metrics, progress: None,
) -> Result:
    """Train one stage and leave a checkpoint in `out`.

    Args: `data` is a corpus as `clsa.train.data` writes it; its tokenizer goes into the checkpoint. `start` is the
    checkpoint that the stage begins with. `resume` goes on from the last snapshot in `out`: without `max_minutes` the
    losses are those of an uninterrupted run. `max_minutes` ends the stage early, with its decay complete. `report`
    gets each logged step and the share of the run that is done.

    Raises TrainError on a loss that is not finite (the last snapshot stays), on frozen weights that changed, and on
    anything that does not fit together, before training.
    """
    if max_minutes is not None and not 0 < max_minutes < 1e6:
        raise TrainError(f"max_minutes must be positive, got {max_minutes}")
    tokens, offsets = load_split(data, "train")
    batches = Batches(tokens, offsets, config.seq_len, config.batch_size, config.seed)
    snapshot = _resumed(config, out) if resume else _fresh(config, out, start, batches)
    if int(tokens.max()) >= snapshot.model.vocab_size:
        raise TrainError(
            f"{data} has token {int(tokens.max())}, beyond the model's vocab_size {snapshot.model.vocab_size}; "
            f"train with the corpus whose tokenizer the model has"
        )
    loop = _Loop(config, out, trainer, batches, snapshot, 60.0 * max_minutes if max_minutes else math.inf, report)
    result = loop.run()
    params = trainer.params()
    check_frozen(params, snapshot.frozen)
    files = find_tokenizer_files(data)
    save_checkpoint(out, snapshot.model, params, dtype=config.save_dtype, tokenizer_files=files, overwrite=True)
    return result


def _fresh(config: TrainConfig, out: Path, start: Path | None, batches: Batches) -> Snapshot:
    if out.is_dir() and any(out.iterdir()):
        raise TrainError(f"{out} is not empty; resume the run in it or give another folder")
    begun = begin(config, start)
    frozen = digests(begun.params, set(begun.params) - set(trainable(config, begun.model)))
    out.mkdir(parents=True, exist_ok=True)
    (out / RECIPE_FILE).write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")
    snapshot = Snapshot(0, 0.0, batches.state(), frozen, config, begun.model, begun.params, {})
    write_snapshot(out, snapshot)
    return snapshot


def _resumed(config: TrainConfig, out: Path) -> Snapshot:
    snapshot = read_snapshot(out)
    old, new = snapshot.config.to_dict(), json.loads(json.dumps(config.to_dict()))
    if old != new:
        changed = sorted(key for key in old | new if old.get(key) != new.get(key))
        raise TrainError(f"the run in {out} was started with another {', '.join(changed)}; it can only go on as it was")
    metrics = out / METRICS_FILE
    if metrics.exists():  # steps after the snapshot will be made, and logged, again
        lines = read_bounded(metrics, 64 * MAX_JSON_BYTES).decode().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= snapshot.step]
        metrics.write_text("".join(kept), encoding="utf-8")
    return snapshot


class _Loop:
    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        trainer: Trainer,
        batches: Batches,
        snapshot: Snapshot,
        max_seconds: float,
        report: Callable[[Metrics, float], None],
    ) -> None:
        self._config, self._out, self._trainer, self._batches = config, out, trainer, batches
        self._snapshot, self._max_seconds, self._report = snapshot, max_seconds, report
        self._step, self._saved = snapshot.step, snapshot.step
        self._last: dict[str, float] = {}
        self._forward = make_forward(snapshot.model)
        trainer.load(snapshot.params)
        trainer.prepare(trainable(config, snapshot.model), (config.beta1, config.beta2), config.eps)
        if snapshot.moments:
            trainer.restore(snapshot.moments, snapshot.step)
        batches.restore(snapshot.data)
        self._started = time.perf_counter()
        self._logged = (snapshot.step, snapshot.seconds)  # step and seconds of the last logged step, for the speed

    def run(self) -> Result:
        c = self._config
        pending: _Pending | None = None
        while (progress := self._progress()) < 1.0:
            launched = self._launch(progress)
            if pending is not None:
                self._finish(pending)  # one step behind, so that the device never waits for the host
            pending = launched
            if self._step % c.save_every == 0:
                self._finish(pending)
                pending = None
                self._save()
        if pending is not None:
            self._finish(pending)
        if self._saved != self._step:
            self._save()
        return Result(self._step, self._step * c.tokens_per_step, self._seconds(), self._last)

    def _seconds(self) -> float:
        return self._snapshot.seconds + time.perf_counter() - self._started

    def _progress(self) -> float:
        return min(1.0, max(self._step / self._config.steps, self._seconds() / self._max_seconds))

    def _launch(self, progress: float) -> _Pending:
        c = self._config
        lr = learning_rate(self._step, progress, c.learning_rate, c.warmup_steps, c.decay)
        self._step += 1
        is_logged = self._step % c.log_every == 0 or self._step in (1, c.steps)
        read = self._trainer.step(
            self._forward,
            [next(self._batches) for _ in range(c.micro_batches)],
            lr=lr,
            clip=c.grad_clip,
            lm_weight=0.0 if c.stage == "indexer" else 1.0,
            kd_weight=1.0 if c.stage == "indexer" else c.kd_weight,
            sparse=c.stage == "joint",
            with_coverage=is_logged,
        )
        return _Pending(self._step, lr, is_logged, read)

    def _finish(self, pending: _Pending) -> None:
        """Wait for a step, stop the run if it went wrong, and log it where it is due."""
        metrics = pending.read()
        wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
        if wrong:
            raise TrainError(
                f"{wrong[0]} is not finite in step {pending.step}; the snapshot of step {self._saved} is kept; "
                f"start again with a lower learning_rate or another seed"
            )
        seconds = self._seconds()
        self._last = {"step": pending.step, **metrics, "lr": pending.lr, "seconds": seconds}
        if not pending.is_logged:
            return
        step, since = self._logged
        speed = (pending.step - step) * self._config.tokens_per_step / max(seconds - since, 1e-9)
        self._logged = pending.step, seconds
        self._last["tokens_per_second"] = speed
        with (self._out / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._last) + "\n")
        self._report(self._last, self._progress())

    def _save(self) -> None:
        s = self._snapshot
        params, moments = self._trainer.params(), self._trainer.moments()
        seconds, data = self._seconds(), self._batches.state()
        write_snapshot(self._out, Snapshot(self._step, seconds, data, s.frozen, self._config, s.model, params, moments))
        self._saved = self._step
