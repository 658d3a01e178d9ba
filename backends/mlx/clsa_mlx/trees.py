"""Values made of tuples and dataclasses, seen as their arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import mlx.core as mx


def arrays_in(value: Any) -> Iterator[mx.array]:
    """The arrays in a value of tuples, lists, dicts and dataclasses, in their order."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from arrays_in(item)
    elif isinstance(value, dict):
        yield from arrays_in(list(value.values()))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from arrays_in([getattr(value, field.name) for field in fields(value)])


def filled(value: Any, change: Callable[[mx.array], Any]) -> Any:
    """A value of tuples and dataclasses with `change` applied to its arrays, in the order of `arrays_in`."""
    if isinstance(value, mx.array):
        return change(value)
    if isinstance(value, tuple):
        return tuple(filled(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: filled(getattr(value, f.name), change) for f in fields(value)})
    return value
