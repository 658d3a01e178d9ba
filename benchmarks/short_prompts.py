"""Prefill of 256 prompts of 100 tokens, beside the same tokens as one prompt.

A model of the demo's sizes with random weights, one token sampled per prompt, no prefix cache. Prints a table, then one
JSON line, and writes it to benchmarks/results/short_prompts_<backend>.json. Run as:

    python benchmarks/short_prompts.py --backend mlx --device cpu
    OMP_NUM_THREADS=1 python benchmarks/short_prompts.py --backend cuda --device cpu   (threads spin on busy cores)
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from random_model import random_model

import clsa
from clsa.llm import LLM

RESULTS = Path(__file__).parent / "results"
TARGET = 1.3


def seconds(llm: LLM, prompts: list[list[int]]) -> float:
    started = time.perf_counter()
    outputs = llm.generate(prompts, clsa.SamplingParams(max_tokens=1))
    took = time.perf_counter() - started
    assert all(output.finish_reason in ("length", "stop") and not output.cached_tokens for output in outputs)
    return took


def measure(backend: str, device: str | None, count: int, length: int, repeats: int) -> dict[str, object]:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = random_model(Path(folder) / "model", count * length + 1)
        engine = clsa.EngineConfig(max_tokens_in_memory=2 * count * length, prefix_cache_bytes=0)
        llm = clsa.load(str(path), backend, device, "float32", engine=engine)
        tokens = [rng.randrange(llm.config.vocab_size) for _ in range(count * length)]
        many = [tokens[i : i + length] for i in range(0, len(tokens), length)]
        seconds(llm, many[:40])  # whatever is made on first use
        pairs = [(seconds(llm, many), seconds(llm, [tokens])) for _ in range(repeats)]
    short, long = min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)
    return {
        "benchmark": "short_prompts",
        "backend": llm.backend,
        "device": llm.device,
        "prompts": count,
        "tokens_each": length,
        "many_seconds": round(short, 3),
        "one_seconds": round(long, 3),
        "ratio": round(short / long, 3),
        "target_ratio": TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--count", type=int, default=256, help="short prompts")
    parser.add_argument("--length", type=int, default=100, help="tokens of each")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    result = measure(args.backend, args.device, args.count, args.length, args.repeats)
    for name, value in result.items():
        print(f"{name:14} {value}")
    text = json.dumps(result)
    (RESULTS / f"short_prompts_{result['backend']}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
