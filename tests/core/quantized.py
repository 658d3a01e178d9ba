"""A small checkpoint of which some matrices can be quantised in groups of 64 and some cannot."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from clsa.checkpoint import save_checkpoint
from clsa.config import ModelConfig, Quantization
from clsa.convert import convert
from clsa.params import init_params

CONFIG = ModelConfig(
    vocab_size=70,
    hidden_size=64,
    intermediate_size=96,  # the rows of down_proj: three groups of 32, and no whole number of 64
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    index_head_dim=10,
    layer_types=("sliding_attention", "sliding_attention", "cross_attention", "cross_attention"),
    index_topk_pattern="FS",
    eos_token_id=1,
    torch_dtype="bfloat16",
)
PARAMS = init_params(CONFIG, 0)
FORMS = [Quantization(group_size=group_size, bits=bits) for bits in (4, 8) for group_size in (32, 64)]


@cache
def original(tied: bool = False) -> Path:
    """The checkpoint before it is quantised; made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="clsa-test-")) / "original"
    params = {name: array for name, array in PARAMS.items() if not tied or name != "lm_head.weight"}
    save_checkpoint(folder, replace(CONFIG, tie_word_embeddings=tied), params)
    return folder


def quantized(folder: Path, how: Quantization, *, tied: bool = False) -> Path:
    """The same, quantised, in `folder`."""
    convert(original(tied), folder, quantization=how)
    return folder
