"""Draw the pictures of docs/ from the committed result files of `clsa bench`.

    python scripts/figures.py

A picture whose result file is not there yet is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clsa.bench.plots import draw, read_result

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = {
    "paper.svg": RESULTS / "h200" / "paper.json",
    "capacity.svg": RESULTS / "h200" / "capacity.json",
    "prefill.svg": RESULTS / "h200" / "prefill.json",
    "serve.svg": RESULTS / "h200" / "serve.json",
    "roofline.svg": RESULTS / "h200" / "ops.json",
    "decode-mlx-cpu.svg": RESULTS / "mlx-cpu-0.2b-decode.json",
}


def draw_all(folder: Path) -> list[str]:
    """Draw into a folder what there are results for; returns the names."""
    names = [name for name, result in PICTURES.items() if result.exists()]
    for name in names:
        draw(read_result(PICTURES[name]), folder / name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    for name in draw_all(parser.parse_args().out):
        print(name)


if __name__ == "__main__":
    main()
