"""What a backend may offer for comparison, and how to ask for it: see `clsa.bench`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Protocol

from clsa.backend import GROUP
from clsa.bench.timing import DeviceTimer
from clsa.config import ModelConfig
from clsa.ops import Ops


class Peer(Protocol):
    """Somebody else's dense model of given sizes, with random weights, on the same device."""

    name: str  # with its version

    def decode(self, context: int, batch: int) -> Any:
        """A function of no arguments that takes one greedy step of `batch` sequences behind `context` random tokens
        of state, and returns when it is done. Raises MemoryError, before anything is allocated, if it cannot fit."""
        ...

    def prefill(self, tokens: int, batch: int) -> Any:
        """A function of no arguments that prefills `batch` prompts of `tokens` each up to the first new token."""
        ...


class OpPeer(Protocol):
    """Somebody else's ops on the arrays of ours."""

    name: str  # with its version

    def prepare(self, op: str, arguments: tuple[Any, ...]) -> Callable[[], Any] | None:
        """A function that computes what our op does with these arguments, and returns the same; None if it has no
        such op. What can be done ahead of time, such as putting rows in its own order, is done before. Raises
        MemoryError, before anything is allocated, if that cannot fit."""
        ...


def op_peers(ops: Ops, dtype: str, device: str | None) -> list[OpPeer]:
    """The peers for single ops that the backend of these ops knows and that are installed."""
    make = getattr(_backend(ops.name), "bench_op_peers", None)
    return [] if make is None else list(make(dtype, device))


def device_timer(ops: Ops) -> DeviceTimer | None:
    """The timer that the backend of these ops offers; None if it offers none."""
    make = getattr(_backend(ops.name), "bench_timer", None)
    timer: DeviceTimer | None = None if make is None else make(ops)
    return timer


def release_cache(ops: Ops) -> None:
    """Let the backend give back what it keeps for later: pieces of it may be in the way of large arrays."""
    release = getattr(_backend(ops.name), "bench_release_cache", None)
    if release is not None:
        release()


def peers(ops: Ops, config: ModelConfig, dtype: str, device: str | None) -> list[Peer]:
    """The peers that the backend of these ops knows and that are installed."""
    make = getattr(_backend(ops.name), "bench_peers", None)
    return [] if make is None else list(make(config, dtype, device))


def _backend(name: str) -> Any:
    return next((entry.load() for entry in entry_points(group=GROUP) if entry.name == name), None)
