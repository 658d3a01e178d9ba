"""The short way to a launch: always the kernel that Triton would have taken, with the same arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LAUNCHES = """
import json, random
import torch
from scripts import host_cost
from triton.runtime import driver

host_cost.pretend()
log = []
driver.active.launcher_cls = lambda source, metadata: lambda *launch: log.append(launch)
from clsa_cuda.kernels import fused
from clsa_cuda.kernels.launch import Launcher

kernel = fused._swiglu_kernel
assert isinstance(kernel, Launcher)
memory = {dtype: torch.zeros(256, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
choices = {
    "dtype": [torch.bfloat16, torch.float32],
    "start": [0, 1, 8],
    "stride": [16, 1, 24, 1 << 40, (1 << 40) + 1],
    "size": [17, 1, 64],
    "block": [128, 256],
    "options": [{}, {"launch_pdl": True}],
}
usual = {name: values[0] for name, values in choices.items()}
some = 3 * [usual | {name: value} for name, values in choices.items() for value in values]
random.Random(0).shuffle(some)
for dtype, start, stride, size, block, options in map(dict.values, some):
    x = memory[dtype]
    arguments = (x[start:], x[8:], x, stride, 2, size)
    constants = {"BLOCK": block, "OVERLAP": bool(options)} | options
    kernel[3, 2](*arguments, **constants)
    short = log.pop()
    wanted = kernel.kernel[3, 2](*arguments, **constants)
    long = log.pop()
    assert not log
    found = kernel._known[tuple(constants)]
    taken = [compiled for compiled, _ in found.values() if compiled is wanted]
    assert taken, "a kernel that Triton did not take"
    assert short[:6] == long[:6] and len(short) == len(long)
    assert all(a is b or a == b for a, b in zip(short[9:], long[9:]))
    assert short[5] is wanted.packed_metadata
kinds = sum(len(found) for found in kernel._known.values())
seen = []
driver.active.launcher_cls = None
import triton
triton.knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
arguments = (memory[torch.float32], memory[torch.float32], memory[torch.float32], 16, 16, 64)
kernel.kernel.run = lambda *args, **options: seen.append("by Triton")
kernel._known[("BLOCK", "OVERLAP")] = {}
kernel[1, 1](*arguments, BLOCK=128, OVERLAP=False)
kernel[1, 1](*arguments, BLOCK=128, OVERLAP=False)
print(json.dumps({"launches": len(some), "kinds": kinds, "with a hook": seen}))
"""


@pytest.fixture(scope="module")
def launches() -> dict[str, Any]:
    """By another process: in Triton's interpreter nothing is compiled."""
    root = Path(__file__).parents[2]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "backends/cuda", root / "backends/mlx")))
    done = subprocess.run([sys.executable, "-c", LAUNCHES], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_kernel_that_triton_would_take(launches: dict[str, Any]) -> None:
    assert launches["launches"] > 2 * launches["kinds"] > 0, "some of them were remembered"


def test_hooks_are_heard(launches: dict[str, Any]) -> None:
    """A profiler hangs a hook on Triton's way, so that way is taken."""
    assert launches["with a hook"] == ["by Triton", "by Triton"]
