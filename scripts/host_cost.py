"""What the host does for one eager step of decodes, of a prompt, or of both, on a machine without a GPU.

Of a step with prompts only the part up to the prefill exit is eager on a GPU; it is shown on its own.

    PYTHONPATH=.:backends/mlx:backends/cuda python scripts/host_cost.py [--plan clsa] [--profile 20]

Kernels are compiled for sm_90 and not launched, matrix products are left out, sizes are small: what remains is Python,
Triton's way to a launch and torch's allocations, for a model of 32 layers. On a GPU the driver's calls come on top.
Milliseconds of processor time, the lowest of many steps. Steps without prompts are recorded on a GPU too: what such a
step leaves to the host is shown last, of an engine in which many sequences answer.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import os
import pkgutil
import pstats
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent))

import gpu_decode  # type: ignore[import-not-found]
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import clsa_cuda.kernels
from clsa.batch import SequenceChunk, pack, upload
from clsa.bench.engine import checked_step, make_engine, random_prompts
from clsa.config import PAGE_SIZE, SamplingParams
from clsa.engine import Engine
from clsa.model import enter, leave, new_state
from clsa.ops import Sampled, State, StepInputs
from clsa.params import nest, tensor_shapes
from clsa.plan import make_plan
from clsa.sampling import SamplingRow, pack_sampling
from clsa_cuda.kernels.ops import KernelOps
from clsa_cuda.kernels.tiles import Limits

H200 = Limits(132, 227 << 10, early_launch=True, hopper=True)
SEQUENCES, CONTEXT, PROMPT = 9, 700, 120  # the last of the sequences brings the prompt
SMALL = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 64}


def pretend() -> None:
    """A GPU that compiles for sm_90 and launches nothing; products that return what is in memory."""
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"multiprocessor_count": 132, "max_shared_mem": 227 << 10},
        load_binary=lambda *kernel: (1, 1, 100, 0, 1024),
    )
    driver.set_active(
        SimpleNamespace(
            utils=utils,
            launcher_cls=lambda source, metadata: lambda *launch: None,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    for module in pkgutil.iter_modules(clsa_cuda.kernels.__path__, "clsa_cuda.kernels."):
        found = importlib.import_module(module.name)
        if hasattr(found, "limits"):
            found.limits = lambda device: H200  # type: ignore[attr-defined]

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch.empty(len(x), len(weight), dtype=x.dtype)

    def addmm(x: Tensor, y: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.empty_like(x) if out is None else out

    F.linear, torch.addmm = linear, addmm  # type: ignore[assignment]


class Steps:
    """A small model of a 4B model's layers, and steps of it."""

    def __init__(self, plan: str) -> None:
        self.config = replace(gpu_decode.config_4b(plan), **SMALL)
        self.plan, self.ops = make_plan(self.config), KernelOps("cpu")
        shapes = tensor_shapes(self.config)
        self.params = nest({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})
        pages = -(-CONTEXT // PAGE_SIZE) + 1
        self.tables = np.arange(SEQUENCES * pages, dtype=np.int32).reshape(SEQUENCES, pages)
        self.state = new_state(self.ops, self.plan, SEQUENCES * pages * PAGE_SIZE, SEQUENCES, "bfloat16")

    def inputs(self, num_decodes: int, with_prompt: bool) -> StepInputs:
        decodes = range(num_decodes)
        chunks = [SequenceChunk([5], CONTEXT, self.tables[b], b, "last") for b in decodes]
        if with_prompt:
            chunks.append(SequenceChunk([5] * PROMPT, CONTEXT - PROMPT, self.tables[-1], SEQUENCES - 1, "none"))
        rows = [SamplingRow(SamplingParams(), CONTEXT + 1, ()) for _ in decodes]
        sampling, source = pack_sampling(rows) if rows else (None, None)
        return StepInputs(pack(chunks, self.config.sliding_window), sampling, None, source)

    def run(self, inputs: StepInputs, whole: bool = True) -> None:
        here = upload(self.ops, inputs)
        rows, self.state = enter(self.ops, self.params, self.plan, here.batch, self.state)
        if whole and rows is not None and here.sampling is not None:
            self.ops.sample(leave(self.ops, self.params, self.plan, rows, self.state), here.sampling)

    def engine(self, sequences: int) -> Engine:
        """In the middle of answers, with steps that are recorded as far as the host can tell."""

        def recorded(inputs: Any, previous: Any, state: State) -> tuple[Sampled | None, State]:
            return Sampled(torch.zeros(len(inputs.sampling.seed), dtype=torch.int32), None, None, None), state

        record, self.ops.record = self.ops.record, lambda compute: recorded  # type: ignore[method-assign]
        config, pages = replace(self.config, max_position_embeddings=CONTEXT), sequences * -(-CONTEXT // PAGE_SIZE)
        engine = make_engine(
            self.ops, self.params, config, "bfloat16", pages=pages, slots=sequences, tokens_per_step=8192
        )
        self.ops.record = record  # type: ignore[method-assign]
        for prompt in random_prompts(sequences, PROMPT):
            params = SamplingParams(max_tokens=CONTEXT - PROMPT, ignore_eos=True)
            engine.add(engine.make_request(prompt, params), in_pieces=False)
        for _ in range(40):
            checked_step(engine)
        return engine


def milliseconds(run: Any, repeats: int = 60) -> float:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", default="clsa", choices=gpu_decode.PLANS)
    parser.add_argument("--profile", type=int, default=0, help="lines of a profile, by own time")
    args = parser.parse_args()
    pretend()
    torch.set_num_threads(1)
    steps = Steps(args.plan)
    for name, num_decodes, with_prompt in (
        ("decodes", SEQUENCES - 1, False),
        ("with a prompt", SEQUENCES - 1, True),
        ("prompt alone", 0, True),
    ):
        inputs = steps.inputs(num_decodes, with_prompt)
        steps.run(inputs)  # compiles
        whole, entered = (milliseconds(lambda inputs=inputs, w=w: steps.run(inputs, w)) for w in (True, False))
        print(f"{name:14s} {whole:6.2f} ms, up to the prefill exit {entered:6.2f} ms", flush=True)
        if args.profile:
            with cProfile.Profile() as profile:
                for _ in range(20):
                    steps.run(inputs)
            pstats.Stats(profile).sort_stats("tottime").print_stats(args.profile)
    for sequences in (32, 256):
        engine = steps.engine(sequences)
        lowest = milliseconds(lambda engine=engine: checked_step(engine), 200)
        print(f"recorded, {sequences:3d} sequences {lowest:6.2f} ms", flush=True)


if __name__ == "__main__":
    main()
