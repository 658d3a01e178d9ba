"""What a decode step of the 4B model asks of the GPU, and that MLX itself accepts the launches."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.mlx

# 16 sliding layers, 16 that read the memory. Every attention is cut into parts, which `combine` joins.
LAUNCHES = {
    "clsa_sliding_attention": 16,
    "clsa_gather_attention": 16,
    "clsa_combine": 32,
    "clsa_norm_rope": 32,
    "clsa_add_rms_norm": 64,
    "clsa_select_scores": 1,
    "clsa_select_candidates": 1,
    "clsa_select_threshold": 1,
    "clsa_select_write": 1,
}


def test_launches_of_a_decode_step_of_the_4b_model(capsys: pytest.CaptureFixture[str]) -> None:
    from clsa.bench.sizes import plan_config
    from tests.metal.launches import count_launches

    config = plan_config("4b", "clsa", 131072)
    plain, ours = (count_launches(config, 131072, with_kernels=on) for on in (False, True))
    with capsys.disabled():
        print(f"\nlaunches of a 4B decode step at 128K: {plain.total()} by plain MLX, {ours.total()} with kernels")
    assert {name: count for name, count in ours.items() if name.startswith("clsa_")} == LAUNCHES
    assert ours["fill of outputs"] == 1
    assert ours.total() < 0.5 * plain.total()


def test_mlx_accepts_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it exports a function, MLX checks launches and writes out kernels without having a GPU."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from clsa.bench.sizes import plan_config
    from clsa_mlx import backend, kernels
    from clsa_mlx.kernels.load import load
    from tests.metal.launches import decode_step

    backend.open("cpu")
    monkeypatch.setattr(kernels, "enabled", True)
    load.cache_clear()
    step, arrays = decode_step(plan_config("4b", "clsa", 131072), 131072)
    names, values = zip(*tree_flatten(arrays))
    events: list[dict[str, Any]] = []
    mx.export_function(events.append, lambda *xs: step(tree_unflatten(list(zip(names, xs)))), *values)
    launched = [event["arguments"][0] for event in events if event.get("name") == "CustomKernel"]
    found = {name: sum(text.startswith(f"custom_kernel_{name}_") for text in launched) for name in LAUNCHES}
    assert found == LAUNCHES and len(launched) == sum(LAUNCHES.values())
