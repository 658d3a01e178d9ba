"""Quantised checkpoints are those that mlx-lm makes of the same model, and its layers read ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from clsa.checkpoint import open_checkpoint
from clsa.config import Quantization
from clsa.params import tensor_shapes
from tests.core.quantized import CONFIG, FORMS, PARAMS, quantized

pytestmark = pytest.mark.mlx
mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
utils = pytest.importorskip("mlx_lm.utils")
on_forms = pytest.mark.parametrize("how", FORMS, ids=lambda how: f"{how.bits}-bit-{how.group_size}")


def mlx_model() -> Any:
    """The weights of PARAMS as modules of mlx.nn under the names of the checkpoint; it computes nothing."""
    root = nn.Module()
    for name, shape in tensor_shapes(CONFIG).items():
        *path, last = name.removesuffix(".weight").split(".")
        if last == "embed_tokens":
            layer = nn.Embedding(*shape)
        else:
            layer = nn.RMSNorm(*shape) if len(shape) == 1 else nn.Linear(shape[1], shape[0], bias=False)
        bits = np.ascontiguousarray(PARAMS[name].astype(ml_dtypes.bfloat16)).view(np.uint16)
        layer.weight = mx.array(bits).view(mx.bfloat16)
        node = root
        for part in path:
            node = node.setdefault(part, nn.Module())
        node[last] = layer
    return root


@on_forms
def test_mlx_lm_makes_the_same_tensors(tmp_path: Path, how: Quantization) -> None:
    from mlx.utils import tree_flatten

    with mx.stream(mx.cpu):
        model, config = utils.quantize_model(mlx_model(), {}, how.group_size, how.bits)
    ours = open_checkpoint(quantized(tmp_path / "q", how))
    written = ours.config.to_dict()["quantization"]
    assert {key: config["quantization"][key] for key in written} == written
    wanted = dict(tree_flatten(model.parameters()))
    arrays = dict(ours.tensors())
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        assert arrays[name].dtype.name == str(array.dtype).removeprefix("mlx.core.")
        if array.dtype == mx.bfloat16:
            assert np.array_equal(arrays[name].view(np.uint16), np.array(array.view(mx.uint16))), name
        else:
            assert np.array_equal(arrays[name], np.array(array)), name


@on_forms
def test_mlx_lm_recognises_the_file(tmp_path: Path, how: Quantization) -> None:
    """What its loader asks: which layers have scales, and what bits and group size follow from the shapes."""
    quantized(tmp_path / "q", how)
    weights = mx.load(str(tmp_path / "q" / "model.safetensors"))
    plain = dict(mlx_model().named_modules())
    paths = [name.removesuffix(".scales") for name in weights if name.endswith(".scales")]
    assert {"model.embed_tokens", "lm_head", "model.memory.k_proj"} <= set(paths)
    for path in paths:
        assert utils.infer_quant_config(path, plain[path], weights) == {
            "group_size": how.group_size,
            "bits": how.bits,
            "mode": "affine",
        }


@on_forms
def test_its_layers_compute_what_the_backend_computes(tmp_path: Path, how: Quantization) -> None:
    from clsa.weights import load_weights
    from clsa_mlx import backend

    ops = backend.open("cpu")
    folder = quantized(tmp_path / "q", how)
    weights = mx.load(str(folder / "model.safetensors"))
    tree = load_weights(ops, open_checkpoint(folder), "float32")
    tokens = mx.array([3, 1, 69], mx.int32)
    table = nn.QuantizedEmbedding(CONFIG.vocab_size, CONFIG.hidden_size, how.group_size, how.bits)
    head = nn.QuantizedLinear(CONFIG.hidden_size, CONFIG.vocab_size, False, how.group_size, how.bits)
    for layer, path in ((table, "model.embed_tokens"), (head, "lm_head")):
        for part in ("weight", "scales", "biases"):
            array = weights[f"{path}.{part}"]
            layer[part] = array if part == "weight" else array.astype(mx.float32)
    x = ops.embed(tree["embed_tokens"], tokens)
    assert mx.array_equal(x, table(tokens))
    assert mx.array_equal(ops.linear(x, tree["lm_head"]), head(x))
