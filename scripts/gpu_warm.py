"""Seconds from the start of a process to its first token, 4B sizes: the second run finds the kernels compiled.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_warm.py --out warm.json

Weights are random and made on the device; reading 7 GB from a disk comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from clsa.bench.bench import Bench, Settings
from clsa.bench.engine import make_engine, random_prompts
from clsa.bench.report import provenance
from clsa.config import SamplingParams
from clsa.residency import num_pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sizes", default="4b")
    parser.add_argument("--device")
    args = parser.parse_args()
    born = os.stat("/proc/self").st_ctime
    bench = Bench(Settings(backend="cuda", device=args.device, sizes=args.sizes, peers=False), print)
    config = bench.config("clsa", 8192)
    params = bench.params(config)
    bench.ops.to_numpy(params["norm"])
    weights = time.time() - born
    pages = num_pages(config.max_position_embeddings)
    engine = make_engine(bench.ops, params, config, bench.dtype, pages=pages, slots=1, tokens_per_step=8192)
    (prompt,) = random_prompts(1, args.tokens)
    engine.add(engine.make_request(prompt, SamplingParams(max_tokens=8, ignore_eos=True)))
    seconds = []
    while engine.has_work:
        if engine.step():
            seconds.append(time.time() - born)
    row = {"weights": weights, "first_token": seconds[0], "eighth_token": seconds[-1], "prompt_tokens": args.tokens}
    print(row)
    args.out.write_text(json.dumps(provenance() | {"device": bench.ops.device} | row, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
