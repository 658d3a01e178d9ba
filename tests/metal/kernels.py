"""Running the project's Metal kernels in the harness, launched by the very functions that the ops call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

import numpy as np

from tests.metal.harness import ORDERS, PLACES, Call, execute
from tests.metal.harness.launch import Order, Place
from tests.metal.harness.sanitize import find_races
from tests.metal.harness.sanitize import unavailable as no_race_detector
from tests.metal.harness.typecheck import check_types, clang

R = TypeVar("R")


def run(compute: Callable[[], R], order: Order = "forward", place: Place = "end") -> R:
    """What `compute` returns when custom kernels of MLX run in the harness."""
    from clsa_mlx.kernels.load import load

    from tests.metal.harness.on_cpu import metal_on_cpu

    load.cache_clear()  # it may keep kernels made elsewhere
    try:
        with metal_on_cpu(order=order, place=place):
            return compute()
    finally:
        load.cache_clear()


def run_everywhere(compute: Callable[[], R]) -> Iterator[tuple[str, R]]:
    """In every order and with both placements of guards: what it was, and what `compute` returned."""
    for order in ORDERS:
        for place in PLACES:
            yield f"{order} order, buffers at the {place}", run(compute, order, place)


def calls_of(compute: Callable[[], Any]) -> list[Call]:
    """The launches that `compute` makes."""
    calls: list[Call] = []

    def record(call: Call, **options: Any) -> list[np.ndarray]:
        calls.append(call)
        return execute(call, **options)

    with mock.patch("tests.metal.harness.on_cpu.execute", record):
        run(compute)
    return calls


def check_soundness(compute: Callable[[], Any], launches: int) -> list[str]:
    """Types and races of every launch; returns what could not be checked here."""
    calls = calls_of(compute)
    assert len(calls) == launches
    for call in calls:
        if clang():
            check_types(call)
        if not no_race_detector():
            find_races(call)
    reasons = [no_race_detector(), None if clang() else "no clang++ for the type check"]
    return [reason for reason in reasons if reason]


