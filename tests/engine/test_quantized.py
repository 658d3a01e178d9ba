"""A quantised checkpoint through the whole program: every backend gives the specification's logits and text."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest

from clsa.config import Quantization, SamplingParams
from clsa.convert import convert
from clsa.ops import QuantizedWeight
from tests.engine import models
from tests.tolerance import relative_rms

PROMPT = "def read_lines(path):\n    with open(path) as file:\n"


@cache
def folder(bits: int, tied: bool) -> Path:
    out = Path(tempfile.mkdtemp(prefix="clsa-test-")) / "quantized"
    source = models.folder(tie_word_embeddings=tied)
    convert(source, out, quantization=Quantization(group_size=32, bits=bits))
    return out


@models.on_backends
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_backend_agrees_with_the_specification(backend: str, bits: int, tied: bool) -> None:
    exact, llm = models.load("numpy", folder(bits, tied)), models.load(backend, folder(bits, tied))
    tokens = exact.tokenizer.encode(PROMPT * 3)
    assert relative_rms(llm.logits(tokens), exact.logits(tokens)) < 1e-4
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    assert llm.generate(PROMPT, params)[0].token_ids == exact.generate(PROMPT, params)[0].token_ids


@pytest.mark.parametrize("bits", [4, 8])
def test_more_bits_are_closer_to_the_original(bits: int) -> None:
    original, llm = models.load("numpy", models.folder()), models.load("numpy", folder(bits, False))
    tokens = original.tokenizer.encode(PROMPT)
    error = relative_rms(llm.logits(tokens), original.logits(tokens))
    low, high = {4: (0.02, 1.0), 8: (1e-4, 0.1)}[bits]
    assert low < error < high


@models.on_backends
def test_how_the_weights_are_held_is_said(backend: str) -> None:
    llm = models.load(backend, folder(4, True))
    kept = isinstance(llm._params["embed_tokens"], QuantizedWeight)
    assert kept == (backend == "mlx")
    assert ("quantised weights are expanded to float32 at load" in llm.why) == (not kept)
    assert "quantised" not in models.load(backend, models.folder()).why
