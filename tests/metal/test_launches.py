"""What a decode step of the 4B model asks of the GPU, and that MLX itself accepts the launches."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.mlx

# 16 sliding layers, 16 that read the memory. Every attention is cut into parts, which `combine` joins.
LAUNCHES = {
    "clsa_attend_window": 16,
    "clsa_gather_attention": 16,
    "clsa_combine": 32,
    "clsa_add_rms_norm": 64,
    "clsa_select_scores": 1,
    "clsa_select_candidates": 1,
    "clsa_select_threshold": 1,
    "clsa_select_write": 1,
}
# A product for q, k and v, one for gate and up, and one that ends each block; and those of memory and head.
PRODUCTS = 32 + 32 + 64 + 2


@pytest.mark.parametrize("bits", [None, 4], ids=["bfloat16", "4 bits"])
def test_launches_of_a_decode_step_of_the_4b_model(bits: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.metal.launches import CONTEXT, count_launches, sizes_4b

    config = sizes_4b(bits)
    plain, ours = (count_launches(config, CONTEXT, with_kernels=on) for on in (False, True))
    with capsys.disabled():
        print(f"\nlaunches of a 4B decode step at 128K, {'bfloat16' if bits is None else f'{bits} bits'}: ", end="")
        print(f"{plain.total()} by plain MLX, {ours.total()} with kernels")
    assert {name: count for name, count in ours.items() if name.startswith("clsa_")} == LAUNCHES
    assert ours["QuantizedMatmul" if bits else "Matmul"] == PRODUCTS
    assert ours["Scatter"] == 2 * 16 + 3 and ours["elementwise, fused"] <= 36
    assert ours["fill of outputs"] == 1 and "Concatenate" not in ours
    assert ours.total() <= (335 if bits is None else 343)


@pytest.mark.parametrize("bits", [None, 8, 4], ids=["bfloat16", "8 bits", "4 bits"])
def test_bytes_of_a_decode_step_of_the_4b_model(bits: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    from clsa.bench.floors import decode_bytes
    from tests.metal.launches import CONTEXT, count_bytes, sizes_4b

    config = sizes_4b(bits)
    moved, floor = count_bytes(config, CONTEXT), decode_bytes(config, CONTEXT, 1, 2).total
    with capsys.disabled():
        print(f"\nbytes of a 4B decode step at 128K: {moved / 1e9:.3f} GB, {moved / floor:.3f} x the floor")
    assert floor <= moved <= 1.15 * floor


def test_the_model_of_bytes_sees_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the weights joined anew in every step, they would be read and written once more."""
    import mlx.core as mx

    from clsa.bench.floors import decode_bytes
    from tests.metal import launches

    monkeypatch.setattr(launches, "_joined", lambda ws: mx.concatenate(list(ws)))
    config = launches.sizes_4b()
    moved = launches.count_bytes(config, launches.CONTEXT)
    assert moved > 1.5 * decode_bytes(config, launches.CONTEXT, 1, 2).total


def test_mlx_accepts_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it exports a function, MLX checks launches and writes out kernels without having a GPU."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from clsa_mlx import backend, kernels, linears
    from clsa_mlx.kernels.load import load
    from tests.metal.launches import CONTEXT, _joined, decode_step, sizes_4b

    backend.open("cpu")
    monkeypatch.setattr(kernels, "enabled", True)
    monkeypatch.setattr(linears, "joined", _joined)
    load.cache_clear()
    step, arrays = decode_step(sizes_4b(), CONTEXT)
    names, values = zip(*tree_flatten(arrays))
    events: list[dict[str, Any]] = []
    mx.export_function(events.append, lambda *xs: step(tree_unflatten(list(zip(names, xs)))), *values)
    launched = [event["arguments"][0] for event in events if event.get("name") == "CustomKernel"]
    found = {name: sum(text.startswith(f"custom_kernel_{name}_") for text in launched) for name in LAUNCHES}
    assert found == LAUNCHES and len(launched) == sum(LAUNCHES.values())
