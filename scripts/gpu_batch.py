"""Thousands of short prompts through the engine, as `clsa generate --input` runs them.

    PYTHONPATH=.:backends/cuda python3 scripts/gpu_batch.py --out batch.json [--cases 256x8192,32x2048]
    python scripts/gpu_batch.py --out /tmp/batch.json --sizes tiny --device cpu --requests 20 --prompt 40 --answer 10

A case is how many sequences run together and how many tokens a step takes at most; the first that is listed by default
is what the engine takes if nobody says otherwise. Weights and prompts are random; an answer has half to all of
`--answer` tokens, so that prompts and answers mix. A few of the requests go first, until kernels are compiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu_long import PLAN, Row, Run  # type: ignore[import-not-found]

from clsa.bench.engine import checked_step, random_prompts
from clsa.bench.report import machine, provenance
from clsa.config import SamplingParams
from clsa.engine import Engine


def fill(engine: Engine, count: int, prompt: int, answer: int, seed: int) -> int:
    """Add requests; the number of tokens that they will answer."""
    lengths = np.random.default_rng(seed).integers(-(-answer // 2), answer + 1, count).tolist()
    for tokens, length in zip(random_prompts(count, prompt, seed=seed), lengths, strict=True):
        request = engine.make_request(tokens, SamplingParams(max_tokens=length, ignore_eos=True))
        engine.add(request, in_pieces=False)
    return sum(lengths)


def answered(engine: Engine, together: int) -> tuple[int, float, list[float]]:
    """Tokens, seconds, and the seconds of those steps in which all answered and nobody began."""
    seen: set[str] = set()
    tokens, full = 0, []
    start = last = time.perf_counter()
    while engine.has_work:
        deltas = [delta for delta in checked_step(engine) if delta.token is not None]
        now = time.perf_counter()
        new = {delta.request.id for delta in deltas} - seen
        if len(deltas) == together and not new:
            full.append(now - last)
        seen |= new
        tokens += len(deltas)
        last = now
    return tokens, last - start, full


def case(run: Run, together: int, tokens_per_step: int) -> Row:
    args = run.args
    args.tokens_per_step = tokens_per_step
    engine = run.engine(run.bench.config(PLAN, args.prompt + args.answer + 1), together)
    fill(engine, min(args.requests, together + together // 4), args.prompt, args.answer, seed=1)
    answered(engine, together)
    wanted = fill(engine, args.requests, args.prompt, args.answer, seed=2)
    tokens, seconds, full = answered(engine, together)
    assert tokens == wanted, (tokens, wanted)
    row: Row = {"together": together, "tokens_per_step": tokens_per_step, "tokens": tokens, "seconds": seconds}
    row |= {"tokens_per_second": tokens / seconds, "prompt_tokens": args.requests * args.prompt}
    return row | ({"full_step_ms": 1e3 * statistics.median(full)} if full else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", help="like 256x8192,32x2048")
    parser.add_argument("--sizes", default="4b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=3072)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--answer", type=int, default=200, help="tokens at most")
    args = parser.parse_args()
    args.context, args.figure_seconds, args.tokens_per_step = args.prompt, 0.2, 2048
    run = Run(args)
    usual = run.ops.step_size
    cases = args.cases or f"{usual.max_num_seqs}x{usual.max_tokens_per_step}"
    result: dict[str, Any] = provenance() | {"machine": machine(run.ops)}
    result |= {"sizes": args.sizes, "requests": args.requests, "prompt": args.prompt}
    result |= {"answer": args.answer, "rows": []}
    for sizes in cases.split(","):
        together, tokens_per_step = map(int, sizes.split("x"))
        result["rows"].append(row := case(run, together, tokens_per_step))
        print(json.dumps(row), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
