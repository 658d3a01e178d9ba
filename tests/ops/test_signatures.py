"""Every backend spells the protocol the same way: names, parameters, kinds and defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from clsa import spec
from clsa.ops import Ops

FUNCTIONS = sorted(name for name, value in vars(Ops).items() if inspect.isfunction(value) and name[0] != "_")


def parameters(function: Any) -> list[tuple[str, object, object]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name != "self"]


def test_the_protocol_has_functions() -> None:
    assert {"select", "sample", "rms_norm"} <= set(FUNCTIONS)
    assert 20 <= len(FUNCTIONS) <= 35, "the protocol is meant to stay narrow"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_specification(name: str) -> None:
    assert parameters(getattr(spec, name)) == parameters(getattr(Ops, name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backend(ops: Ops, name: str) -> None:
    assert parameters(getattr(ops, name)) == parameters(getattr(Ops, name))


def test_names(ops: Ops) -> None:
    assert ops.name in ("mlx", "cuda") and isinstance(ops.device, str) and ops.device
    assert spec.name == "numpy" and spec.device
