"""The ops with kernels inside the whole model; and what MLX itself says to the launches."""

from __future__ import annotations

import pytest

from clsa.ops import Ops
from tests.metal.harness.launch import Order
from tests.metal.kernels import calls_of, run
from tests.ops.test_model_parity import Text, assert_parity

pytestmark = pytest.mark.mlx


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Ops:
    from clsa_mlx import backend, kernels

    opened = backend.open("cpu")
    monkeypatch.setattr(kernels, "enabled", True)
    return opened


@pytest.mark.parametrize("order", ["forward", "random"])
@pytest.mark.parametrize(
    "case", ["clsa", "clsa-group4", "mixed", "indexcache", "yoco", "clsa-k1", "clsa-window1", "clsa-blocks4"]
)
def test_prompts_and_decode_steps(ops: Ops, case: str, order: Order) -> None:
    """Two texts: a prompt each, then steps with a token of both."""
    one, other = Text(1, 80, [7, 2], 3), Text(2, 70, [4, 1], 0)
    steps = [[one.chunk(0, 66), other.chunk(0, 5)], [other.chunk(5, 64)]]
    steps += [[one.chunk(66 + i, 67 + i), other.chunk(64 + i, 65 + i)] for i in range(4)]
    run(lambda: assert_parity(ops, case, steps), order)


def test_decode_steps_use_every_kernel(ops: Ops) -> None:
    text = Text(1, 67, [7, 2], 3)
    calls = calls_of(lambda: assert_parity(ops, "clsa", [[text.chunk(0, 66)], [text.chunk(66, 67)]]))
    names = {call.source.kernel.name.removeprefix("clsa_") for call in calls}
    selecting = {f"select_{part}" for part in ("scores", "candidates", "threshold", "write")}
    assert names == {"norm_rope", "add_rms_norm", "gather_attention", "attend_window", *selecting}
