"""Time to first token of a second question about a document of 32K tokens, beside the first.

A model of the demo's sizes with random weights and room for the document. Prints a table, then one JSON line, and
writes it to benchmarks/results/prefix_reuse.json. Run as:

    python benchmarks/prefix_reuse.py --backend mlx --device cpu
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

RESULT = Path(__file__).parent / "results" / "prefix_reuse.json"
TARGET = 0.05


def first_token_seconds(llm: LLM, prompt: list[int]) -> tuple[float, int]:
    """Seconds until the first token is read, and how many tokens of the prompt were cached."""
    started = time.perf_counter()
    piece = next(iter(llm.stream(prompt, clsa.SamplingParams(max_tokens=8, ignore_eos=True))))
    return time.perf_counter() - started, piece.cached_tokens


def measure(backend: str, device: str | None, length: int, question: int, repeats: int) -> dict[str, object]:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = random_model(Path(folder) / "model", length + 4 * question)
        engine = clsa.EngineConfig(max_num_seqs=4, max_tokens_in_memory=2 * length)
        llm = clsa.load(str(path), backend, device, "float32", engine=engine)
        vocab_size = llm.config.vocab_size

        def tokens(count: int) -> list[int]:
            return [rng.randrange(vocab_size) for _ in range(count)]

        first_token_seconds(llm, tokens(300))  # whatever is made on first use
        firsts, seconds, cached = [], [], 0
        for _ in range(repeats):
            document = tokens(length)
            firsts.append(first_token_seconds(llm, document + tokens(question))[0])
            time_again, cached = first_token_seconds(llm, document + tokens(question))
            seconds.append(time_again)
    first, again = min(firsts), min(seconds)
    return {
        "benchmark": "prefix_reuse",
        "backend": llm.backend,
        "device": llm.device,
        "document_tokens": length,
        "question_tokens": question,
        "cached_tokens": cached,
        "first_seconds": round(first, 4),
        "second_seconds": round(again, 4),
        "ratio": round(again / first, 5),
        "target_ratio": TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--length", type=int, default=32_767, help="tokens of the document; one short of a snapshot")
    parser.add_argument("--question", type=int, default=200, help="tokens of each question")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    result = measure(args.backend, args.device, args.length, args.question, args.repeats)
    for name, value in result.items():
        print(f"{name:16} {value}")
    text = json.dumps(result)
    RESULT.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
