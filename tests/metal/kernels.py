"""Running the project's Metal kernels, launched by the very functions that the ops call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from clsa import spec
from clsa.ops import Ops
from tests.metal.harness import ORDERS, PLACES, Call
from tests.metal.harness.launch import Order, Place
from tests.metal.harness.sanitize import find_races
from tests.metal.harness.sanitize import unavailable as no_race_detector
from tests.metal.harness.typecheck import check_types, clang

R = TypeVar("R")
SPEC = cast(Ops, spec)


def mlx_ops() -> Ops:
    from clsa_mlx import ops

    return cast(Ops, ops)


def run(
    compute: Callable[[], R],
    order: Order = "forward",
    place: Place = "end",
    watch: Callable[[Call, Any], None] | None = None,
) -> R:
    """What `compute` returns when custom kernels of MLX run in the harness; on a Mac, what its GPU makes of them."""
    import mlx.core as mx

    from clsa_mlx.kernels.load import load
    from tests.metal.harness.on_cpu import metal_on_cpu

    if mx.metal.is_available():
        mx.set_default_device(mx.gpu)
        return compute()
    load.cache_clear()  # it may keep kernels made elsewhere
    try:
        with metal_on_cpu(order=order, place=place, watch=watch):
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
    run(compute, watch=lambda call, outputs: calls.append(call))
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
