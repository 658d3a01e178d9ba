"""`KernelOps`: every kind of step gives what the specification gives, by a kernel or by the plain op."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops, Selection
from clsa_cuda.kernels.ops import KernelOps
from tests.cuda.conftest import DEVICE
from tests.ops.cases import STEPS, Chunk, filled_memory, filled_window, host, layout, normal
from tests.ops.routing import arrays
from tests.tolerance import assert_close, assert_equal


@pytest.fixture(scope="module")
def kernel_ops() -> Ops:
    return KernelOps(DEVICE)


@pytest.mark.parametrize("name", ["decode-padded", "prefill-padded"])
def test_a_whole_step(kernel_ops: Ops, name: str) -> None:
    """Select, attend to the selection, to everything and to the window; rows of blocks too."""
    rng = np.random.default_rng(0)
    step = layout(rng, STEPS[name])
    num_tokens = len(step.positions)
    q, k, v = (normal(rng, num_tokens, heads, 16, dtype="float32") for heads in (4, 2, 2))
    keys, values = (normal(rng, step.num_rows, 2, 16, dtype="float32") for _ in range(2))
    ring_k, ring_v = (normal(rng, step.num_slots * 8, 2, 16, dtype="float32") for _ in range(2))
    q_idx, k_idx = (rng.integers(-2, 3, (n, 8)).astype(np.float32) for n in (num_tokens, step.num_rows))
    results = []
    for ops in (kernel_ops, spec):
        memory = filled_memory(ops, keys, values, k_idx, "float32")
        queries = step.queries(ops)
        tokens = ops.asarray(q)
        index = ops.asarray(q_idx)
        selection = ops.select(index, memory, queries, 20, 1)
        own, window = (ops.asarray(k), ops.asarray(v)), filled_window(ops, ring_k, ring_v, 8, "float32")
        results.append(
            (
                arrays(ops, selection) + arrays(ops, ops.select(index, memory, queries, 20, 4)),
                host(ops, ops.gather_attention(tokens, memory, selection), "float32"),
                host(ops, ops.dense_attention(tokens, memory, queries), "float32"),
                host(ops, ops.sliding_attention(tokens, *own, window, queries), "float32"),
            )
        )
    for got, want in zip(results[0][0], results[1][0], strict=True):
        assert_equal("select", got, want, name)
    for op, got, want in zip(("gather_attention", "dense_attention", "sliding_attention"), *(r[1:] for r in results)):
        assert_close(op, "float32", got, want, name)


@pytest.mark.parametrize("rows", [3, 70])  # 70: more than a kernel for few rows takes
def test_closing_a_layer_leaves_what_it_is_given(kernel_ops: Ops, dtype: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    shapes = {"o_proj": (64, 48), "gate": (80, 64), "up": (80, 64), "down": (64, 80)}
    w = {name: normal(rng, *shape, dtype=dtype, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
    x, o, norm = (normal(rng, *shape, dtype=dtype) for shape in ((rows, 64), (rows, 48), (64,)))
    given = {name: kernel_ops.asarray(array) for name, array in {"x": x, "o": o, "norm": norm, **w}.items()}
    got = kernel_ops.close_layer(**given, eps=1e-6)
    want = spec.close_layer(x, o, norm=norm, eps=1e-6, **w)
    assert_close("close_layer", dtype, host(kernel_ops, got, dtype), want, rows)
    for array, before in ((given["x"], x), (given["o"], o)):
        assert_equal("close_layer", host(kernel_ops, array, dtype), before, rows)


def test_what_may_be_new_is_not_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention reads its first keys early only where `norm_linears` or `norm_rope` came last."""
    from clsa_cuda.kernels import ops as module

    fresh: list[bool] = []
    monkeypatch.setattr(module, "gather_attention", lambda *args, **kwargs: fresh.append(kwargs["fresh"]))
    ops: Any = KernelOps(DEVICE)
    step = layout(np.random.default_rng(0), [Chunk(70, 1)])
    x = ops.asarray(np.ones((1, 8), np.float32))
    weight, rows = ops.asarray(np.ones((8, 8), np.float32)), ops.asarray(np.zeros(1, np.int32))
    zeros = np.zeros((step.num_rows, 1, 8), np.float32)
    memory = filled_memory(ops, zeros, zeros, None, "float32")
    selection = Selection(rows[:, None], rows[:, None], rows + 1)
    makers: dict[str, Any] = {
        "norm_linears": lambda: ops.norm_linears(x, weight[0], 1e-6, (weight,)),
        "norm_rope": lambda: ops.norm_rope(x[:, None], weight[0], 1e-6, rows, 1e4),
        "write_memory": lambda: ops.write_memory(memory, x[:, None], x[:, None], None, rows - 1),
        "embed": lambda: ops.embed(weight, rows),
        "dense_attention": lambda: ops.dense_attention(x[:, None], memory, step.queries(ops)),
        "attention": lambda: None,
    }
    for first, second in itertools.product(("write_memory", "norm_linears"), makers):
        makers[first]()
        makers[second]()
        ops.gather_attention(x[:, None], memory, selection)
        if second == "attention":
            ops.gather_attention(x[:, None], memory, selection)
    assert fresh == [*[False] * 2, *[True] * 5, *[False] * 2, *[True] * 3, False, True]


def test_a_large_selection(kernel_ops: Ops) -> None:
    """More than the kernel takes: the plain op."""
    rng = np.random.default_rng(0)
    step = layout(rng, [Chunk(70, 1)])
    k_idx = normal(rng, step.num_rows, 8, dtype="float32")
    kv = np.zeros((step.num_rows, 1, 2), np.float32)
    memory = filled_memory(kernel_ops, kv, kv, k_idx, "float32")
    q_idx = kernel_ops.asarray(normal(rng, 1, 8, dtype="float32"))
    got = kernel_ops.select(q_idx, memory, step.queries(kernel_ops), 8193, 1)
    assert got.rows.shape == (1, 8193) and int(got.lengths[0]) == 71
