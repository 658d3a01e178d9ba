"""The seam between the training loop, which knows steps and files, and a backend's arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clsa import model
from clsa.backend import GROUP
from clsa.config import ModelConfig
from clsa.errors import BackendError
from clsa.ops import Array, Ops, StepBatch
from clsa.params import nest
from clsa.plan import make_plan

Forward = Callable[[Ops, Mapping[str, Array], StepBatch], Array]  # flat weights -> logits [B * T, V] float32
Tokens = NDArray[np.int32]  # [B, T]
TRAIN_DTYPES = ("float32", "bfloat16")


class Trainer(Protocol):
    """Weights, optimiser and gradients on one device. Weights and moments are float32; computing is in its dtype.

    It runs the model through `forward` alone, so it knows no architecture. The same calls give the same numbers on a
    CPU, bit for bit.
    """

    device: str  # what it computes on, in words a user reads

    def load(self, params: Mapping[str, np.ndarray]) -> None:
        """Take all weights, flat, float32. Forgets any optimiser."""
        ...

    def prepare(self, trainable: Mapping[str, float], betas: tuple[float, float], eps: float) -> None:
        """AdamW over the named weights, each with its weight decay; all others are frozen."""
        ...

    def step(
        self,
        forward: Forward,
        batches: Sequence[tuple[Tokens, Tokens]],
        *,
        lr: float,
        clip: float,
        lm_weight: float,
        kd_weight: float,
        sparse: bool,
        with_coverage: bool,
    ) -> Callable[[], dict[str, float]]:
        """One update from the mean gradient of equal micro-batches (inputs, targets).

        The loss is `lm_weight` * cross-entropy + `kd_weight` * distillation (paper, equations 6-8); `clip` bounds the
        gradient's norm. Returns a function that waits for the step's means: `loss`, `lm_loss`, `grad_norm` and, where
        the model has an index, `kd_loss` and (if asked) `coverage`.
        """
        ...

    def score(
        self, forward: Forward, inputs: Tokens, targets: Tokens, *, sparse: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Cross-entropy [B, T] of each token, and the selection's coverage [B, T] or None without an index."""
        ...

    def params(self) -> dict[str, np.ndarray]:
        """All weights, flat, float32."""
        ...

    def moments(self) -> dict[str, np.ndarray]:
        """The optimiser's state, float32; `restore` takes it back."""
        ...

    def restore(self, moments: Mapping[str, np.ndarray], step: int) -> None:
        """Go on as if `step` updates had been made. Raises TrainError if moments are missing or misshapen."""
        ...


def make_forward(config: ModelConfig) -> Forward:
    """`clsa.model.forward` for whole sequences: no state before, logits of every row."""
    plan = make_plan(config)

    def forward(ops: Ops, params: Mapping[str, Array], batch: StepBatch) -> Array:
        state = model.new_state(ops, plan, rows=1, slots=1, dtype="float32")
        logits, _ = model.forward(ops, nest(params), plan, batch, state)
        return logits

    return forward


def open_trainer(backend: str = "auto", device: str | None = None, dtype: str = "bfloat16") -> Trainer:
    """The trainer of an installed backend; "auto" takes the one that has a trainer. Raises BackendError."""
    refused: list[str] = []
    for entry in sorted(_entries(backend), key=lambda entry: entry.name):
        module: Any = entry.load()
        if hasattr(module, "open_trainer"):
            trainer: Trainer = module.open_trainer(device, dtype)
            return trainer
        refused.append(entry.name)
    raise BackendError(
        f'no backend that trains is installed ({", ".join(refused)} cannot); pip install "clsa[train]" adds torch'
        if backend == "auto"
        else f"backend {backend!r} cannot train; use --backend cuda, which also trains on a CPU"
    )


def _entries(backend: str) -> Iterable[Any]:
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if backend == "auto":
        return found.values()
    if backend not in found:
        raise BackendError(f"backend must be 'auto' or one of {', '.join(sorted(found))}, got {backend!r}")
    return [found[backend]]
