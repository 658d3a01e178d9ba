"""Selected rows are gathered once for the layers that share them, and anew when anything has changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clsa.ops import Memory, Ops, Selection

pytestmark = pytest.mark.mlx
mx = pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def ops() -> Ops:
    from clsa_mlx import backend

    return backend.open("cpu")


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time that K or V is gathered."""
    from clsa_mlx import attention

    found: list[Any] = []
    gather = attention._gather_heads

    def watched(x: Any, rows: Any) -> Any:
        found.append(x.shape)
        return gather(x, rows)

    monkeypatch.setattr(attention, "_gather_heads", watched)
    return found


def selection(*rows: int) -> Selection:
    positions = mx.array([rows], mx.int32)
    return Selection(positions, mx.array([rows], mx.int32), mx.array([len(rows)], mx.int32))


def written(ops: Ops, memory: Memory, row: int) -> Memory:
    kv = mx.random.normal((1, 2, 8))
    return ops.write_memory(memory, kv, kv, None, mx.array([row], mx.int32))


def filled(ops: Ops) -> Memory:
    memory = ops.new_memory(64, 2, 8, None, "float32")
    for row in range(8):
        memory = written(ops, memory, row)
    return memory


def test_layers_share_what_was_gathered(ops: Ops, gathers: list[Any]) -> None:
    memory, other, chosen = filled(ops), filled(ops), selection(1, 3, 5)
    outs = [ops.to_numpy(ops.gather_attention(mx.ones((1, 4, 8)), memory, chosen)) for _ in range(3)]
    assert len(gathers) == 2 and all(np.array_equal(out, outs[0]) for out in outs)
    ops.gather_attention(mx.ones((1, 4, 8)), other, chosen)
    ops.gather_attention(mx.ones((1, 4, 8)), other, selection(1, 3, 5))
    assert len(gathers) == 6, "another memory, another selection"


def test_a_write_is_seen(ops: Ops, gathers: list[Any]) -> None:
    memory, chosen, q = filled(ops), selection(1, 3, 5), mx.ones((1, 4, 8))
    before = ops.to_numpy(ops.gather_attention(q, memory, chosen))
    memory = written(ops, memory, 3)
    after = ops.to_numpy(ops.gather_attention(q, memory, chosen))
    assert len(gathers) == 4 and not np.allclose(before, after)
    assert np.array_equal(after, ops.to_numpy(ops.gather_attention(q, memory, selection(1, 3, 5))))


def test_nothing_is_kept_behind_a_step(ops: Ops) -> None:
    from clsa_mlx.state import gathered

    memory, chosen = filled(ops), selection(1, 3, 5)
    mx.eval(ops.gather_attention(mx.ones((1, 4, 8)), memory, chosen))
    assert len(gathered) == 1
    del chosen
    assert not gathered
