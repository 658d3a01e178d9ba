"""What pictures are made of: numbers out of a result's rows, and bars. `figure` and `axes` are matplotlib's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from clsa.bench.report import Row
from clsa.config import show
from clsa.errors import RequestError

T = TypeVar("T")
Table = dict[str, list[float | None]]  # plan -> a number or none for each group of bars

# Okabe and Ito's colours, which differ for every kind of eye, and in grey.
_PLANS = {
    "transformer": ("Transformer", "#7f7f7f"),
    "yoco": ("YOCO dense", "#56b4e9"),
    "dsa": ("DSA", "#e69f00"),
    "indexcache": ("IndexCache", "#cc79a7"),
    "clsa": ("CLSA", "#0072b2"),
}
_OTHERS = ("#009e73", "#d55e00", "#f0e442", "#000000")
PARTS = {"mlp": ("MLP", "#7f7f7f"), "attention": ("attention", "#0072b2"), "routing": ("routing", "#e69f00")}


# -- rows ----------------------------------------------------------------------------------------------------


def number(row: Row, key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RequestError(f"{key} in the result must be a number from 0, got {show(value)}")
    return float(value)


def distinct(rows: Sequence[Row], key: str, kind: type[T]) -> list[T]:
    """The distinct values of a key, in order of appearance. Raises RequestError if a row has none of this kind."""
    found: dict[T, None] = {}
    for row in rows:
        if not isinstance(value := row.get(key), kind):
            raise RequestError(f"{key} must be {kind.__name__} in every row of the result, got {show(value)}")
        found[value] = None
    return list(found)


def table_of(rows: Sequence[Row], key: str, value: str) -> Table:
    """`value` by plan and by the distinct values of `key`; None where there is no such row."""
    groups, plans = distinct(rows, key, type(rows[0].get(key))), distinct(rows, "plan", str)
    found = {(row["plan"], row[key]): number(row, value) for row in rows}
    return {plan: [found.get((plan, group)) for group in groups] for plan in plans}


def tokens(count: int) -> str:
    """131072 -> 128K, as the field writes context lengths."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{letter}"
    return f"{count:,}"


# -- bars ----------------------------------------------------------------------------------------------------


def colours(names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(name, label, colour) of each series."""
    others = 0
    for name in names:
        label, colour = _PLANS.get(name, (name if len(name) <= 40 else name[:37] + "...", ""))
        if not colour:
            colour, others = _OTHERS[others % len(_OTHERS)], others + 1
        yield name, label, colour


def bars(axes: Any, groups: Sequence[str], table: Table, marks: dict[str, list[str]] | None = None) -> None:
    """Bars side by side; on top of each what `marks` says, or its ratio to the first series."""
    width = 0.84 / len(table)
    base = next(iter(table.values()))
    for i, (name, label, colour) in enumerate(colours(list(table))):
        at = [g - 0.42 + (i + 0.5) * width for g in range(len(groups))]
        heights = [value or 0.0 for value in table[name]]
        axes.bar(at, heights, 0.92 * width, color=colour, label=label)
        for g, (x, value) in enumerate(zip(at, table[name], strict=True)):
            mark = ratio_mark(value, base[g]) if marks is None else marks[name][g]
            axes.annotate(mark, (x, value or 0.0), (0, 1.5), textcoords="offset points", ha="center", fontsize=6.5)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def ratio_mark(value: float | None, base: float | None) -> str:
    if not value:
        return "none"
    return f"{value / base:.1f}x" if base else ""


def finish(figure: Any, first: Any, width: float, height: float) -> None:
    figure.set_size_inches(width, height)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, int(width / 1.7)))
