"""A model of the demo's sizes with random weights, for benchmarks whose prompts are longer than the demo takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clsa.checkpoint import find_tokenizer_files, read_config, save_checkpoint
from clsa.hub import resolve
from clsa.params import init_params


def random_model(folder: Path, positions: int) -> Path:
    """A checkpoint of the demo's sizes that takes so many positions."""
    demo = resolve("demo")
    config = replace(read_config(demo), max_position_embeddings=positions)
    save_checkpoint(folder, config, init_params(config, 0), tokenizer_files=find_tokenizer_files(demo))
    return folder
