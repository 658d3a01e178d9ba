"""The bundled demo says the same on every backend in float32, greedily, whatever the length of the prompt."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest

import clsa
from clsa import EngineConfig, SamplingParams
from clsa.outputs import RequestOutput

DEMO = Path(clsa.__file__).parent / "assets" / "demo" / "config.json"
# A few tokens, one window, more tokens than the index selects; and after that the text of a whole module.
PROMPTS = [
    "def read_lines(path):\n",
    '"""Small helpers for text files."""\n\nimport os\n\n\nclass Reader:\n    def __init__(self, path):\n' * 4,
    "".join(f"def function_{i}(first, second):\n    return first * {i} + second\n\n\n" for i in range(30)),
]

pytestmark = pytest.mark.skipif(not DEMO.exists(), reason="the bundled demo model is not there (clsa/assets/demo)")


@functools.cache
def outputs(backend: str) -> list[RequestOutput]:
    llm = clsa.load(
        "demo",
        backend=backend,
        device="cpu" if backend == "cuda" else None,
        dtype="float32",
        engine=EngineConfig(max_num_seqs=4, max_model_len=2048),
    )
    return llm.generate(PROMPTS, SamplingParams(max_tokens=32))


@pytest.mark.parametrize("backend", [pytest.param("mlx", marks=pytest.mark.mlx), "cuda"])
def test_greedy_text_of_the_demo(backend: str) -> None:
    if backend == "cuda" and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    wanted = outputs("numpy")
    assert [output.token_ids for output in outputs(backend)] == [output.token_ids for output in wanted]
    assert [output.text for output in outputs(backend)] == [output.text for output in wanted]
    assert min(output.prompt_tokens for output in wanted) < 128 and max(output.prompt_tokens for output in wanted) > 256
    assert all(len(set(output.token_ids)) > 4 for output in wanted), "text, and not one token again and again"
