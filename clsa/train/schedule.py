"""The learning rate: linear warm-up by steps, then a decay by the progress of the run."""

from __future__ import annotations

import math

DECAYS = ("constant", "cosine", "linear")


def learning_rate(step: int, progress: float, peak: float, warmup_steps: int, decay: str) -> float:
    """The rate of update `step` (from 0), when a share `progress` in [0, 1] of the run is done.

    "cosine" and "linear" fall from the peak to zero over the whole run. Progress counts steps or, in a run bounded in
    time, time: so the decay is complete when the time is up.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if decay == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        left = 1.0 - progress if decay == "linear" else 1.0
    return peak * warm * left
