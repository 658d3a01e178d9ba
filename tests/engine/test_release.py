"""Weights and state go when the last reference to a model does: a device has no room for those of the model before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from clsa import LLM, SamplingParams
from clsa.batch import upload
from clsa.ops import Compute
from tests.engine import models

HOW = SamplingParams(max_tokens=5, ignore_eos=True)


class Recorded:
    """Keeps what it records, as the recorders of GPUs do."""

    def __init__(self, ops: Any, compute: Compute) -> None:
        self._ops, self._compute = ops, compute

    def __call__(self, inputs: Any, previous: Any, state: Any) -> Any:
        return self._compute(upload(self._ops, inputs), previous, state)


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def recorded(backend: str, patch: pytest.MonkeyPatch) -> LLM:
    ops: Any = models.open_ops(backend)
    if isinstance(ops, ModuleType):
        patch.setattr(ops, "record", lambda compute: Recorded(ops, compute))
    else:
        patch.setattr(type(ops), "record", lambda ops, compute: Recorded(ops, compute))
    return models.load(backend)


def used(llm: LLM) -> list[weakref.ref[Any]]:
    """References to the parts that hold arrays, after answers of every kind of step."""
    llm.generate([[5] * 70, [7] * 9], HOW)
    next(llm.stream([5] * 40, HOW))
    runner = llm._engine._runner
    assert isinstance(runner._recorded, Recorded)
    state = runner._state
    assert state is not None
    return [weakref.ref(x) for x in (llm._engine, runner, llm._params["norm"], state.memories[0].k)]


@models.on_backends
def test_with_the_last_reference(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = recorded(backend, monkeypatch)
    parts = used(llm)
    del llm
    assert [part() for part in parts] == [None] * len(parts)


@models.on_backends
def test_when_it_is_closed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = recorded(backend, monkeypatch)
    parts = used(llm)
    llm.close()
    assert [part() for part in parts] == [None] * len(parts)
