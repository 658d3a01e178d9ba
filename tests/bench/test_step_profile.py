"""The table of a step's kernels: nothing is lost, nothing is counted twice, unknown names are seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.batch import SequenceChunk, build_batch
from clsa.bench.floors import decode_bytes
from clsa.bench.sizes import PLANS, plan_config
from clsa.config import ModelConfig
from clsa.model import forward, new_state
from clsa.params import init_params, nest
from clsa.plan import make_plan
from scripts.step_profile import Launch, _products, part_bytes, step_profile

CONTEXT, BATCH, READ = 131072, 8, 4e12


def step_of(config: ModelConfig, fused: bool) -> list[tuple[str, float]]:
    """Kernel names and microseconds of a decode step."""
    kernels: list[tuple[str, float]] = [("void at::native::indexSelectSmallIndex<c10::BFloat16>(...)", 2.0)]
    closing = [("_close_layer_kernel", 30.0)] if fused else [("_ring_kernel", us) for us in (6.0, 20.0, 14.0)]
    for layer in make_plan(config).layers:
        cross, routes = layer.kind == "cross_attention", layer.route == "F"
        kernels += [("_linear_kernel", 4.0)] * (cross and (layer.writes_memory or routes))
        kernels += [("_score_kernel", 20.0), ("_pick_kernel", 15.0)] * routes
        kernels.append(("_linear_kernel", 8.0))
        kernels += [("_attend_pages_kernel" if layer.route == "D" else "_attend_kernel", 10.0), *closing]
    return [*kernels, ("_linear_kernel", 180.0), ("void at::native::reduce_kernel<512, 1>(...)", 8.0)]


def trace(step: list[tuple[str, float]], steps: int, overlap: float = 0.0) -> list[Launch]:
    launches, now = [], 0.0
    for name, duration in step * steps:
        launches.append(Launch(name, now, duration))
        now += duration - overlap
    return launches[::-1]  # a profiler promises no order


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("fused", [True, False])
def test_every_byte_and_every_microsecond_is_in_one_row(plan: str, fused: bool) -> None:
    config = plan_config("4b", plan, CONTEXT + 64)
    step = step_of(config, fused)
    got = step_profile(trace(step, 3), 3, config, CONTEXT, BATCH, 2, READ)
    rows = got["kernels"]
    parts = part_bytes(config, CONTEXT, BATCH, 2)
    # Norms are part of products here, whose rows leave their 0.3 MB out.
    assert sum(row["bytes"] for row in rows) == sum(parts.values()) - parts["norms"]
    assert sum(parts.values()) - parts["scores"] - parts["logits"] == decode_bytes(config, CONTEXT, BATCH, 2).total
    assert sum(row["us"] for row in rows) == pytest.approx(got["summed_us"]) == pytest.approx(sum(us for _, us in step))
    assert sum(row["launches"] for row in rows) == got["launches"] == len(step)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["us"] for row in rows[:-1]] == sorted((row["us"] for row in rows[:-1]), reverse=True)


def test_rows_of_clsa_by_hand() -> None:
    config = plan_config("4b", "clsa", CONTEXT + 64)
    got = step_profile(trace(step_of(config, True), 2), 2, config, CONTEXT, BATCH, 2, READ)
    rows = {row["kernel"]: row for row in got["kernels"]}
    sliding, memory = rows["_attend_kernel sliding"], rows["_attend_kernel"]
    assert (sliding["launches"], memory["launches"]) == (16, 16)
    assert sliding["bytes"] == BATCH * 16 * 512 * 2048 and memory["bytes"] == BATCH * 16 * 2048 * 2048
    head = rows["_linear_kernel head"]
    assert head["bytes"] == 2 * 151936 * 2560 and head["us"] == pytest.approx(180)
    assert head["of_floor"] == pytest.approx(head["bytes"] / READ / 180e-6)
    closing = rows["_close_layer_kernel"]
    assert closing["bytes"] == 2 * 32 * (2560 * 2560 + 3 * 2560 * 7680) and closing["us"] == pytest.approx(32 * 30)
    assert rows["_linear_kernel qkv"]["bytes"] == 2 * 16 * 2560 * (2560 + 2 * 512)
    others = got["kernels"][-1]
    assert others["kernel"] == "4 others"  # top-k, what is made for the memory, the reduction, the embedding
    assert others["bytes"] == BATCH * 4 * (CONTEXT + 151936) + 2 * 2560 * (2 * 512 + 128 + 128)


def test_products_are_told_apart() -> None:
    config = plan_config("4b", "clsa", CONTEXT + 64)
    rows = {
        row["kernel"]: row
        for row in step_profile(trace(step_of(config, False), 2), 2, config, 64, 1, 2, READ)["kernels"]
    }
    assert rows["_ring_kernel gate_up"]["us"] == pytest.approx(32 * 20)
    assert rows["_ring_kernel gate_up"]["bytes"] == 2 * 32 * 2 * 2560 * 7680
    assert (rows["_ring_kernel o"]["launches"], rows["_linear_kernel q"]["launches"]) == (32, 16)
    more = [*step_of(config, False), ("_linear_kernel", 1.0)]  # one that nobody knows: then none is told apart
    rows = {row["kernel"]: row for row in step_profile(trace(more, 2), 2, config, 64, 1, 2, READ)["kernels"]}
    assert "_ring_kernel o" not in rows and rows["_ring_kernel"]["launches"] + rows["_linear_kernel"]["launches"] == 131


class _Products:
    """The specification, with the products of a step counted as launches."""

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        op = getattr(spec, name)

        def counted(*args: Any) -> Any:
            self.count += {"norm_linears": 1, "close_layer": 3}.get(name, 0)
            return op(*args)

        return counted


@pytest.mark.parametrize("plan", PLANS)
def test_the_model_has_the_products_that_are_told_apart(plan: str) -> None:
    config = plan_config("tiny", plan, 200)
    ops, layers = _Products(), make_plan(config)
    params = nest({name: x.astype(np.float64) for name, x in init_params(config, 0).items()})
    batch = build_batch(ops, [SequenceChunk([1], 70, [1, 0], 0, "last")], config.sliding_window)
    forward(ops, params, layers, batch, new_state(spec, layers, 128, 1, "float32"))
    assert ops.count == len(_products(config, True))


def test_overlap_is_told() -> None:
    config = plan_config("tiny", "clsa", CONTEXT + 64)
    step = [("_linear_kernel", 10.0), ("_attend_kernel", 10.0)]
    got = step_profile(trace(step, 4, overlap=2.0), 4, config, CONTEXT, BATCH, 2, READ)
    assert got["summed_us"] == pytest.approx(20)
    assert got["busy_us"] == pytest.approx((8 * 8 + 2) / 4)
    apart = step_profile(trace(step, 4, overlap=-3.0), 4, config, CONTEXT, BATCH, 2, READ)
    assert apart["busy_us"] == apart["summed_us"] == pytest.approx(20)


def test_unknown_kernels_are_visible() -> None:
    config = plan_config("tiny", "clsa", CONTEXT + 64)
    got = step_profile(trace([("brand_new<7>", 9.0), ("_linear_kernel", 1.0)], 2), 2, config, CONTEXT, 1, 2, READ)
    row = got["kernels"][0]
    assert (row["kernel"], row["what"], row["bytes"], row["of_floor"]) == ("brand_new<7>", "unknown", 0, None)


@pytest.mark.parametrize("count", [0, 3])
def test_unequal_steps_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="equal steps"):
        step_profile([Launch("x", 0, 1)] * count, 2, plan_config("tiny", "clsa", 200), 100, 1, 2, READ)
