"""What a decode step's time goes to, kernel by kernel, from a profiler's list of launches; and what each must read.

A trace has no arguments, so bytes are counted from the config: every part of what a step must read belongs to the
first kernel of `_TABLE` that was launched and claims it. Unknown names keep their own line and have no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from clsa.bench.floors import decode_bytes
from clsa.config import ModelConfig
from clsa.params import tensor_shapes
from clsa.plan import make_plan

SHOWN = 0.01  # of the sum of all durations: what takes less is summed up in one line


class Launch(NamedTuple):
    """One kernel of a trace; times in microseconds."""

    name: str
    start: float
    duration: float


_PRODUCTS = {
    "qkv": "q, k, v of sliding layers",
    "full_qkv": "q, k, v and index of full layers",
    "memory": "k, v and index of the memory",
    "q": "q of layers that read a memory",
    "index_q": "q of the index",
    "o": "output projections",
    "gate_up": "gate and up",
    "down": "down",
    "head": "head",
}
_CLOSING = ("o", "gate_up", "down")
_FEW_ROWS = ("_ring_kernel", "_linear_kernel")  # products of few rows

# Beginning of a kernel's name (after "void "), in words, parts of `part_bytes` that it reads.
_TABLE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("_close_layer_kernel", "output projection, feed-forward, residuals", _CLOSING),
    ("_rms_norm_kernel", "norm", ("norms",)),
    *((f"{kernel} {name}", words, (name,)) for kernel in _FEW_ROWS for name, words in _PRODUCTS.items()),
    *((kernel, "products", (*_PRODUCTS, "norms")) for kernel in _FEW_ROWS),
    ("nvjet", "products by cuBLAS", (*_PRODUCTS, "norms")),
    ("cublas", "products by cuBLAS", ()),
    ("_attend_kernel sliding", "attention over windows", ("windows",)),
    ("_attend_kernel", "attention over the memory", ("selected", "windows")),
    ("_attend_pages_kernel", "attention over whole contexts", ("dense",)),
    ("_compact_kernel", "copy of selected rows", ()),
    ("_score_kernel", "routing: scores", ("index_keys",)),
    ("_pick_kernel", "routing: top-k", ("scores",)),
    ("_greedy_kernel", "sampling", ("logits",)),
    ("_embed_kernel", "rows of the tokens", ()),
    ("_norm_rope_kernel", "QK norm and rotation", ()),
    ("_swiglu_kernel", "SwiGLU", ()),
    ("_write_kernel", "writes of state", ()),
    ("at::native::reduce_kernel", "sampling: reductions", ("logits",)),
    ("at::native", "other kernels of torch", ()),
    ("Memset", "memset", ()),
    ("Memcpy", "copies", ()),
)


def part_bytes(config: ModelConfig, context: int, batch: int, itemsize: int) -> dict[str, int]:
    """Bytes that a decode step must read, by what they are: the parts of `decode_bytes`, weights by product."""
    step = decode_bytes(config, context, batch, itemsize)
    weights = dict.fromkeys((*_PRODUCTS, "norms"), 0)
    for name, shape in tensor_shapes(config).items():
        weights[_product(name, config)] += itemsize * math.prod(shape)
    if not config.tie_word_embeddings:  # of the embedding only the rows of the tokens are read
        weights["head"] -= itemsize * config.vocab_size * config.hidden_size
    routes = sum(layer.route == "F" for layer in make_plan(config).layers)
    return weights | {
        "windows": step.windows,
        "selected": step.selected,
        "dense": step.dense,
        "index_keys": step.index_keys,
        "scores": routes * batch * context * 4,
        "logits": batch * config.vocab_size * 4,
    }


def _product(name: str, config: ModelConfig) -> str:
    """The product that reads a tensor of this name."""
    parts = name.split(".")
    if "norm" in name:
        return "norms"
    if parts[1] != "layers":
        return "memory" if parts[1] == "memory" else "head"
    layer, what = make_plan(config).layers[int(parts[2])], parts[4]
    if what == "o_proj":
        return "o"
    if parts[3] == "mlp":
        return "down" if what == "down_proj" else "gate_up"
    if layer.kind != "cross_attention":
        return "qkv" if layer.kind == "sliding_attention" else "full_qkv"
    if parts[3] == "indexer":
        return "memory" if layer.writes_memory else "index_q"
    return "q"


def _products(config: ModelConfig, closing: bool) -> list[str]:
    """The products of a step in the order of `clsa.model.forward`; `closing`: those that end a layer too."""
    names = []
    for layer in make_plan(config).layers:
        if layer.kind == "cross_attention":
            names += ["memory"] * layer.writes_memory + ["index_q"] * (layer.route == "F" and not layer.writes_memory)
            names.append("q")
        else:
            names.append("qkv" if layer.kind == "sliding_attention" else "full_qkv")
        names += _CLOSING if closing else ()
    return [*names, "head"]


def step_profile(
    launches: Sequence[Launch], steps: int, config: ModelConfig, context: int, batch: int, itemsize: int, read: float
) -> dict[str, Any]:
    """The table of one step, from the launches of `steps` equal ones; `read` in bytes per second.

    `summed_us` adds durations, `busy_us` is the time in which some kernel runs: where the next kernel starts while
    the last one ends, the first is longer. Rows are sorted by time; `share` is of `summed_us`, `of_floor` of a row is
    the time its bytes take at least over its own.
    """
    names = [name for step in _split(launches, steps) for name in _told_apart([x.name for x in step], config)]
    ordered = sorted(launches, key=lambda x: x.start)
    found: dict[str, list[float]] = {}
    for name, launch in zip(names, ordered, strict=True):
        found.setdefault(name, []).append(launch.duration)
    left = part_bytes(config, context, batch, itemsize)
    moved = _claims(list(found), left)
    summed = sum(x.duration for x in launches) / steps
    rows = [_row(name, durations, steps, summed, moved[name], read) for name, durations in found.items()]
    rows.sort(key=lambda row: -row["us"])
    shown = [row for row in rows if row["share"] >= SHOWN]
    small = rows[len(shown) :]
    if small:
        rest = {key: sum(row[key] for row in small) for key in ("launches", "us", "share", "bytes")}
        shown.append({"kernel": f"{len(small)} others", "what": "below 1 % each", **rest, "of_floor": None})
    return {
        "launches": len(launches) / steps,
        "summed_us": summed,
        "busy_us": _busy(ordered) / steps,
        "floor_us": decode_bytes(config, context, batch, itemsize).total / read * 1e6,
        "kernels": shown,
    }


def _row(name: str, durations: list[float], steps: int, summed: float, moved: int, read: float) -> dict[str, Any]:
    us = sum(durations) / steps
    return {
        "kernel": name,
        "what": _entry(name)[1],
        "launches": len(durations) / steps,
        "us": us,
        "share": us / summed,
        "bytes": moved,
        "of_floor": moved / read * 1e6 / us if moved else None,
    }


def _split(launches: Sequence[Launch], steps: int) -> list[list[Launch]]:
    if steps < 1 or not launches or len(launches) % steps:
        raise ValueError(f"{len(launches)} launches are not those of {steps} equal steps")
    ordered, size = sorted(launches, key=lambda x: x.start), len(launches) // steps
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _told_apart(names: list[str], config: ModelConfig) -> list[str]:
    """Names of one step in order, with what each product is for and what attention reads, where their numbers fit."""
    kinds = ["sliding" if kind == "sliding_attention" else "" for kind in config.layer_types]
    closing = not any(name.startswith("_close_layer_kernel") for name in names)
    for kernels, uses in ((("_attend_kernel", "_attend_pages_kernel"), kinds), (_FEW_ROWS, _products(config, closing))):
        found = [i for i, name in enumerate(names) if name.startswith(kernels)]
        if len(found) == len(uses):
            for i, use in zip(found, uses, strict=True):
                names[i] = f"{names[i].split()[0]} {use}".rstrip()
    return names


def _entry(name: str) -> tuple[str, str, tuple[str, ...]]:
    plain = name.removeprefix("void ")
    return next((entry for entry in _TABLE if plain.startswith(entry[0])), (name, "unknown", ()))


def _claims(names: list[str], left: dict[str, int]) -> dict[str, int]:
    """Bytes by kernel. A part goes to the first claim of the table; kernels of one entry share by coming first."""
    moved = dict.fromkeys(names, 0)
    order = {entry[0]: i for i, entry in enumerate(_TABLE)}
    for name in sorted(names, key=lambda name: order.get(_entry(name)[0], len(order))):
        moved[name] = sum(left.pop(part, 0) for part in _entry(name)[2])
    return moved


def _busy(ordered: Sequence[Launch]) -> float:
    total, end = 0.0, float("-inf")
    for _, start, duration in ordered:
        total += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total
