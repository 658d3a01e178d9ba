"""Memory of `clsa generate --input --output` over a million lines, half of them finished by an earlier run.

The model is a stand-in that answers at once, in any order, so the figures are those of reading, keeping ids and
writing. Prints a table, then one JSON line, and writes it to benchmarks/results/batch_memory.json. Run as:

    python benchmarks/batch_memory.py
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from clsa.config import SamplingParams
from clsa.outputs import RequestOutput
from clsa_cli.batch import Batch

RESULT = Path(__file__).parent / "results" / "batch_memory.json"
TARGET_MB = 200


class StandIn:
    """Answers every prompt with the same text, a few requests later than it was asked; `stop` ends it early."""

    tokenizer = None

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self.peak = 0

    def run(
        self, requests: Iterable[tuple[Any, Any, SamplingParams]], *, ordered: bool, salt: str
    ) -> Generator[tuple[Any, RequestOutput]]:
        waiting: deque[Any] = deque()
        for i, (key, _, _) in enumerate(requests):
            if i == self.stop:
                return
            waiting.append(key)
            if len(waiting) == 64:
                yield waiting.popleft(), RequestOutput("text " * 20, list(range(20)), "length", 30, 0, None, None)
            if i % 10_000 == 0:
                self.peak = max(self.peak, resident_bytes())
        yield from ((key, RequestOutput("", [], "length", 30, 0, None, None)) for key in waiting)


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(lines: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        requests, results = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        with requests.open("w") as file:
            for i in range(lines):
                body = {"prompt": f"question number {i} of a nightly job", "max_tokens": 20}
                file.write(json.dumps({"custom_id": f"customer-{i:08}-{i * 7919 % lines:08}", "body": body}) + "\n")
        before = resident_bytes()
        first, second = StandIn(lines // 2), StandIn(lines)
        started = time.perf_counter()
        Batch(requests, results).run(first, "stand-in", SamplingParams())  # type: ignore[arg-type]
        summary = Batch(requests, results).run(second, "stand-in", SamplingParams())  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        ids = {json.loads(line)["custom_id"] for line in results.open()}
        assert len(ids) == lines == summary.completed + summary.skipped
        written = sum(1 for _ in results.open())
    assert written == lines, "each id exactly once"
    growth = (max(first.peak, second.peak) - before) / 1e6
    return {
        "benchmark": "batch_memory",
        "lines": lines,
        "growth_mb": round(growth, 1),
        "target_mb": TARGET_MB,
        "microseconds_per_line": round(seconds / (1.5 * lines) * 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    result = measure(parser.parse_args().lines)
    for name, value in result.items():
        print(f"{name:22} {value}")
    text = json.dumps(result)
    RESULT.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
