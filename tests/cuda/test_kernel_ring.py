"""Products by the ring of weights against the specification: the kernel on a Hopper GPU, `fake_gluon` without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clsa import spec
from clsa.ops import Weight
from clsa_cuda import plain
from clsa_cuda.kernels import linear, ring_product
from clsa_cuda.kernels.overlap import arrival_counters
from clsa_cuda.kernels.ring_tiles import BLOCK_N, RingTiles, block_of_rows, ring_bytes, ring_tiles, tiles_for
from clsa_cuda.kernels.tiles import Limits, limits
from tests.cuda.conftest import DEVICE
from tests.cuda.fake_gluon import FakeGluon, emulated
from tests.cuda.test_kernel_fused import array, part, wide
from tests.tolerance import assert_close, relative_rms

HOPPER = Limits(132, 227 << 10, early_launch=True, hopper=True)
ON_CPU = DEVICE == "cpu"
EPS = 0.1  # enough to be seen
TENSOR_CORES = 2e-5  # error of their float32 sums, which they do not round to nearest
# Outputs, inputs, whether there is a norm before and a gate behind: the products of a 4B layer, and the head.
SIZES_4B = [
    (3584, 2560, True, False),
    (2560, 2560, False, False),
    (7680, 2560, True, True),
    (2560, 7680, False, False),
    (151936, 2560, True, False),
]
# What happens as late as may be: copies, products.
LATE = {"early": (False, False), "late products": (False, True), "late copies": (True, False), "late": (True, True)}
# Rows, outputs, inputs, tiles. Parts of K: as long as each other or not, with fewer blocks than stages, with none;
# and rings that go round several times.
CASES = {
    "three blocks": (1, 33, 192, RingTiles(11, 64, 1, 3)),
    "six rounds": (1, 130, 1280, RingTiles(50, 64, 1, 3)),
    "six blocks": (8, 64, 384, RingTiles(64, 64, 1, 6)),
    "long blocks": (3, 70, 1280, RingTiles(64, 256, 2, 3)),
    "short last part": (8, 33, 896, RingTiles(20, 128, 3, 4)),
    "two parts": (17, 130, 832, RingTiles(64, 64, 2, 5)),
    "three parts": (32, 33, 1536, RingTiles(33, 64, 3, 6)),
    "empty part": (64, 70, 512, RingTiles(40, 128, 3, 3)),
    "many rows": (64, 1, 640, RingTiles(1, 64, 1, 4)),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGluon | None]:
    """The emulator, or None where the kernel runs as it is."""
    counters = arrival_counters(torch.device(DEVICE))
    if ON_CPU:
        with emulated(monkeypatch, ring_product, "_ring_kernel") as fake:
            yield fake
    elif torch.cuda.get_device_capability()[0] == 9:
        yield None
    else:
        pytest.skip("the kernel is for Hopper (sm_90)")
    left = int(counters.count_nonzero())
    counters.zero_()
    assert left == 0, "counters that are not zero again"


@pytest.fixture(params=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=LATE if ON_CPU else ["as it is"])
def is_late(request: pytest.FixtureRequest, gpu: FakeGluon | None) -> None:
    """What a GPU may do, at its most extreme."""
    if gpu is not None:
        gpu.late_copies, gpu.late_products = LATE[request.param]


def device() -> Limits:
    return HOPPER if ON_CPU else limits(torch.device(DEVICE))


def multiply(
    x: torch.Tensor,
    weight: Weight,
    tiles: RingTiles,
    *,
    norm: torch.Tensor | None = None,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return ring_product.ring_product(
        x, weight, norm, EPS, swiglu, residual, dtype=dtype or x.dtype, tiles=tiles, device=device()
    )


def part_of_aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """As `part`, but in reach of copies of 16 bytes."""
    held = torch.full((x.shape[0], x.shape[1] + 32), torch.nan, dtype=x.dtype, device=x.device)
    held[:, 16:-16] = x
    return held[:, 16:-16]


def inputs(dtype: str, rows: int, out_size: int, in_size: int) -> tuple[torch.Tensor, ...]:
    """x, weights twice as many as outputs, the norm's weight, a residual."""
    rng = np.random.default_rng(0)
    weight = array(rng, dtype, 2 * out_size, in_size) * in_size**-0.5
    return array(rng, dtype, rows, in_size), weight, array(rng, dtype, in_size), array(rng, dtype, rows, out_size)


@pytest.mark.parametrize("name", CASES)
def test_ring_product(gpu: FakeGluon | None, is_late: None, dtype: str, name: str) -> None:
    """Alone, with a norm before it, with the feed-forward's gate or a residual behind it, and with all of them."""
    rows, out_size, in_size, tiles = CASES[name]
    x, weight, norm, residual = inputs(dtype, rows, out_size, in_size)
    pairs = {False: (wide(x) @ wide(weight[:out_size]).T, wide(x) @ wide(weight[out_size:]).T)}
    pairs[True] = spec.norm_linears(wide(x), wide(norm), EPS, (wide(weight[:out_size]), wide(weight[out_size:])))
    for number, options in enumerate(("", "norm", "swiglu", "norm swiglu", "add", "norm swiglu add")):
        normed, swiglu, add = (name in options for name in ("norm", "swiglu", "add"))
        given = (x, part_of_aligned_rows(x), part(x))[number % 3]
        got = multiply(
            given,
            weight if swiglu else weight[:out_size],
            replace(tiles, splits=1, block_k=min(128, tiles.block_k)) if swiglu else tiles,
            norm=norm if normed else None,
            swiglu=swiglu,
            residual=part(residual) if add else None,
        )
        want = spec.swiglu(*pairs[normed]) if swiglu else pairs[normed][0]
        want = want + wide(residual) if add else want
        op = "norm_swiglu" if swiglu else "norm_linears" if normed else "linear"
        assert_close(op, dtype, wide(got), want, (name, options))


@pytest.mark.parametrize(
    "rows, in_size, tiles",
    [(1, 1280, RingTiles(30, 128, 1, 3)), (5, 1280, RingTiles(64, 256, 2, 3)), (33, 896, RingTiles(45, 128, 3, 4))],
)
def test_products_of_float8_weights(
    gpu: FakeGluon | None, is_late: None, rows: int, in_size: int, tiles: RingTiles
) -> None:
    x, weight, norm, residual = inputs("bfloat16", rows, 45, in_size)
    values = plain.float8_weight(weight)
    dense = wide(plain.dense(values, torch.float32))
    want = spec.norm_linears(wide(x), wide(norm), EPS, [dense])[0]
    got = multiply(part_of_aligned_rows(x), values, tiles, norm=norm)
    assert_close("norm_linears", "bfloat16", wide(got), want, rows)
    got = multiply(x, values, tiles, residual=part(torch.cat([residual, residual], 1)))
    assert_close("add_linear", "bfloat16", wide(got), wide(x) @ dense.T + np.tile(wide(residual), 2), rows)
    got = multiply(x, values, replace(tiles, splits=1), norm=norm, swiglu=True)
    assert_close("norm_swiglu", "bfloat16", wide(got), spec.swiglu(want[:, :45], want[:, 45:]), rows)


def test_the_order_of_programs_changes_nothing(gpu: FakeGluon | None, dtype: str) -> None:
    """Whichever part of K is the last to arrive adds all of them, always in the same order."""
    x, weight, norm, residual = inputs(dtype, 8, 70, 896)
    results = []
    for seed in range(8):
        if gpu is not None:
            gpu.seed = seed
        results.append(multiply(x, weight[:70], RingTiles(40, 128, 3, 3), norm=norm, residual=residual))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("normed, swiglu, splits", [(False, False, 3), (True, False, 2), (True, True, 1)])
def test_a_row_does_not_depend_on_the_others(
    gpu: FakeGluon | None, dtype: str, normed: bool, swiglu: bool, splits: int
) -> None:
    x, weight, norm, _ = inputs(dtype, 8, 33, 640)
    tiles = RingTiles(20, 64, splits, 3)
    together = multiply(x, weight, tiles, norm=norm if normed else None, swiglu=swiglu)
    for row in (0, 5):
        alone = multiply(x[row : row + 1], weight, tiles, norm=norm if normed else None, swiglu=swiglu)
        assert torch.equal(alone[0], together[row]), row


@pytest.mark.parametrize("splits", [1, 2])
def test_a_wider_result_is_not_rounded(gpu: FakeGluon | None, dtype: str, splits: int) -> None:
    x, weight, norm, _ = inputs(dtype, 3, 35, 512)
    tiles = RingTiles(40, 64, splits, 3)
    got = multiply(x, weight, tiles, dtype=torch.float32)
    assert got.dtype == torch.float32
    assert relative_rms(wide(got), wide(x) @ wide(weight).T) < TENSOR_CORES
    got = multiply(x, weight, tiles, norm=norm, dtype=torch.float32)
    want = spec.norm_linears(wide(x), wide(norm), EPS, [wide(weight)])[0]
    assert_close("norm_linears", dtype, wide(got), want, splits)


def one_element_further(x: torch.Tensor) -> torch.Tensor:
    """The same values where no 16 bytes begin."""
    held = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return held[1:].view(x.shape).copy_(x)


def test_x_that_is_not_aligned_is_copied(gpu: FakeGluon | None) -> None:
    x, weight, _, _ = inputs("bfloat16", 5, 20, 256)
    want = multiply(x, weight, RingTiles(40, 64, 1, 3))
    for given in (one_element_further(x), x.T.contiguous().T, part(x)):
        assert torch.equal(multiply(given, weight, RingTiles(40, 64, 1, 3)), want)


def test_what_the_ring_cannot_take() -> None:
    x, weight, norm, _ = inputs("bfloat16", 4, 64, 1024)
    assert tiles_for(x, weight, False, None, HOPPER) and tiles_for(x, weight, True, norm, HOPPER)
    assert tiles_for(x, weight, False, None, replace(HOPPER, hopper=False)) is None
    assert tiles_for(x, one_element_further(weight), False, None, HOPPER) is None
    assert tiles_for(x, weight, False, one_element_further(norm), HOPPER) is None
    for in_size in (100, 128, 2600):  # of no whole blocks, or of fewer than the ring has
        assert ring_tiles(4, 3584, in_size, False, True, HOPPER) is None


@pytest.mark.parametrize("out_size, in_size, norm, swiglu", SIZES_4B)
@pytest.mark.parametrize("rows, itemsize", [(1, 2), (8, 2), (32, 2), (64, 2), (1, 1), (16, 1)])
def test_tiles_fill_their_waves(
    rows: int, itemsize: int, out_size: int, in_size: int, norm: bool, swiglu: bool
) -> None:
    """Two programs share a multiprocessor, and its 228 KB, where there is more than one wave."""
    tiles = ring_tiles(rows, out_size, in_size, swiglu, norm, HOPPER, itemsize)
    assert tiles is not None and tiles.rows <= BLOCK_N and tiles.num_stages >= 3
    waves = -(-out_size // (BLOCK_N * HOPPER.sm_count))
    assert 0.9 * waves * HOPPER.sm_count <= tiles.units(out_size) <= waves * HOPPER.sm_count
    used = tiles.num_stages * ring_bytes(block_of_rows(rows), tiles.block_k, swiglu, norm, itemsize)
    used += 2 * block_of_rows(rows) * tiles.block_k if itemsize == 1 else 0
    assert min(waves, 2) * (used + 1024) <= 228 << 10 and used <= HOPPER.shared_memory
    assert tiles.num_stages <= -(-in_size // (tiles.block_k * tiles.splits))
    assert tiles.splits == 1 or not swiglu
    assert not norm or block_of_rows(rows) * tiles.block_k <= 8192  # squares, 64 registers of a thread


@pytest.mark.parametrize("rows", [17, 32, 33])
def test_of_more_rows_only_the_gate_has_8_bits_in_the_ring(rows: int) -> None:
    taken = [ring_tiles(rows, *size[:2], size[3], size[2], HOPPER, 1) is not None for size in SIZES_4B]
    assert taken == [size[3] and rows <= 32 for size in SIZES_4B]


@pytest.mark.parametrize("early_launch", [False, True])
@pytest.mark.parametrize("out_size", [60, 90, 400])  # in three parts, two, and one in three waves
def test_linear_product_takes_the_ring(
    gpu: FakeGluon | None, monkeypatch: pytest.MonkeyPatch, out_size: int, early_launch: bool
) -> None:
    here = Limits(3, 227 << 10, hopper=True) if ON_CPU else device()
    monkeypatch.setattr(linear, "limits", lambda _: replace(here, early_launch=early_launch))
    launches: list[RingTiles] = []
    run = ring_product.ring_product

    def counted(*args: Any) -> torch.Tensor:
        launches.extend(arg for arg in args if isinstance(arg, RingTiles))
        return run(*args)

    monkeypatch.setattr(ring_product, "ring_product", counted)
    x, weight, norm, residual = inputs("bfloat16", 3, out_size, 1024)
    gate, up = (wide(x) @ wide(w).T for w in weight.split(out_size))
    got = linear.product(x, weight[:out_size], residual=part(residual))
    assert_close("add_linear", "bfloat16", wide(got), gate + wide(residual), out_size)
    got = linear.product(part(x), weight[:out_size], dtype=torch.float32)
    assert relative_rms(wide(got), gate) < TENSOR_CORES
    gate, up = spec.norm_linears(wide(x), wide(norm), EPS, [wide(w) for w in weight.split(out_size)])
    got = linear.product(x, weight[:out_size], norm=norm, eps=EPS)
    assert_close("norm_linears", "bfloat16", wide(got), gate, out_size)
    got = linear.product(x, weight, norm=norm, eps=EPS, swiglu=True)
    assert_close("norm_swiglu", "bfloat16", wide(got), spec.swiglu(gate, up), out_size)
    assert len(launches) == 4
    if ON_CPU:
        assert launches[0].splits == {60: 3, 90: 2, 400: 1}[out_size]


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from scripts.kernel_resources import linear_of

for rows, out_type, size in json.loads(sys.argv[1]):
    kernel, types, constants, options = linear_of(rows, *size)
    types["out"] = out_type
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name, kind in types.items() if kind != "fp32" and name != "M"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(json.dumps({"constants": constants, "shared": compiled.metadata.shared, "ptx": compiled.asm["ptx"]}))
"""
COMPILED: list[tuple[int, str, tuple[Any, ...]]]
COMPILED = [(rows, "*bf16", size) for rows, size in zip((1, 8, 32, 64), SIZES_4B)]
COMPILED += [(1, "*fp32", SIZES_4B[-1]), (32, "*bf16", (*SIZES_4B[2], "float8"))]


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Of `COMPILED`. By another process: in Triton's interpreter nothing compiles."""
    root = Path(__file__).parents[2]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "backends/cuda")])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(COMPILED)], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(COMPILED)))
def test_the_whole_ring_is_asked_for_before_the_wait(compiled: list[dict[str, Any]], number: int) -> None:
    """What the compiler makes of it for sm_90: 16 bytes a copy, all of the ring's weights in front of the wait."""
    constants, ptx = compiled[number]["constants"], compiled[number]["ptx"]
    assert compiled[number]["shared"] <= HOPPER.shared_memory
    assert "wgmma.mma_async" in ptx and "griddepcontrol.launch_dependents" in ptx
    assert "cp.async.ca" not in ptx and ptx.count("cp.async.cg") == ptx.count("], 0x10, ")
    weights = BLOCK_N * constants["BLOCK_K"] * (2 if constants["SWIGLU"] else 1) * (1 if constants["SCALED"] else 2)
    of_a_tile = weights // (16 * 128) + constants["NORM"]  # copies by each of 128 threads
    assert ptx.split("griddepcontrol.wait")[0].count("cp.async.cg") == constants["STAGES"] * of_a_tile
