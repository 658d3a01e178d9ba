"""CLSA checkpoints in mlx-lm: the same tokens and logits as our engine, however mlx-lm cuts and batches."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import clsa
from clsa import BackendError, ConfigError, RequestError, SamplingParams
from clsa.config import Quantization
from clsa.convert import convert
from tests.engine import models
from tests.engine.models import CROSS, FULL, SLIDING

pytestmark = pytest.mark.mlx
mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
import clsa_mlx.mlx_lm as registration  # noqa: E402

PLANS: dict[str, dict[str, Any]] = {
    "clsa": {},
    "yoco": {"index_topk_pattern": "DD", "tie_word_embeddings": True},
    "dsa": {"layer_types": (FULL, FULL, FULL, FULL), "index_topk_pattern": "FFSF"},
    "state-after-cross": {"layer_types": (SLIDING, CROSS, CROSS, SLIDING)},
    "windows-only": {"layer_types": (SLIDING,) * 4, "index_topk_pattern": ""},
}
IDS = np.random.default_rng(0).integers(2, models.CONFIG.vocab_size, 400).tolist()
DEMO = Path(clsa.__file__).parent / "assets" / "demo"


def ours(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[tuple[int, ...]]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [tuple(out.token_ids) for out in models.load("mlx", folder).generate(prompts, params)]


def theirs(model: Any, prompt: list[int], max_tokens: int, **options: Any) -> tuple[int, ...]:
    """Greedy tokens of mlx-lm's own loop."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt), model, max_tokens=max_tokens, **options)
    return tuple(int(token) for token, _ in steps)


@pytest.mark.parametrize("plan", PLANS)
def test_tokens_equal_ours_in_any_chunks(plan: str) -> None:
    folder = models.folder(**PLANS[plan])
    model, _ = mlx_lm.load(str(folder))
    prompts = [IDS[:1], IDS[:2], IDS[5:20], IDS[:64], IDS[:150]]
    wanted = ours(folder, prompts, 30)
    for prompt, tokens in zip(prompts, wanted, strict=True):
        for step_size in (2048, 50, 7) if plan == "clsa" else (50,):
            assert theirs(model, prompt, 30, prefill_step_size=step_size) == tokens, (len(prompt), step_size)


def test_text_of_generate_and_stream_equals_ours() -> None:
    folder = models.folder()
    model, tokenizer = mlx_lm.load(str(folder))
    llm = models.load("mlx", folder)
    for length in (3, 40, 300):
        prompt = models.TEXT[:length]
        out = llm.generate([prompt], SamplingParams(max_tokens=25))[0]
        text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=25)
        for special in ("<|bos|>", "<|end|>"):  # mlx-lm shows special tokens, we do not
            text = text.replace(special, "")
        assert text == out.text
        pieces = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=25, prefill_step_size=32))
        assert [piece.token for piece in pieces] == list(out.token_ids)
        assert pieces[-1].finish_reason == out.finish_reason
        assert pieces[-1].prompt_tokens == out.prompt_tokens


def test_demo_text_equals_ours() -> None:
    model, tokenizer = mlx_lm.load(str(DEMO))
    prompt = "def read_lines(path):\n" * 40  # longer than the window and the selection
    out = clsa.load("demo", backend="mlx").generate([prompt], SamplingParams(max_tokens=24))[0]
    assert out.prompt_tokens > 256
    assert theirs(model, tokenizer.encode(prompt), 24) == tuple(out.token_ids)
    # mlx-lm leaves out the first space of any text.
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=24) == out.text.removeprefix(" ")


@pytest.mark.parametrize("plan", PLANS)
def test_batches_equal_ours(plan: str) -> None:
    """Ragged prompts, padded and cut by mlx-lm, which leave the batch and join it at different times."""
    folder = models.folder(**PLANS[plan])
    model, tokenizer = mlx_lm.load(str(folder))
    tokenizer.eos_token_ids.clear()
    prompts = [IDS[:1], IDS[3:130], IDS[:17], IDS[:70], IDS[9:11], IDS[2:90]]
    lengths = [30, 4, 12, 25, 1, 9]
    wanted = [t[:n] for t, n in zip(ours(folder, prompts, 30), lengths, strict=True)]
    sizes = {"completion_batch_size": 3, "prefill_batch_size": 2, "prefill_step_size": 40}
    whole = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=lengths, return_token_ids=True)
    assert [tuple(ids) for ids in whole.token_ids] == wanted
    got = mlx_lm.batch_generate(
        model, tokenizer, prompts, max_tokens=lengths, return_token_ids=True, return_prompt_caches=True, **sizes
    )
    assert [tuple(ids) for ids in got.token_ids] == wanted
    # The caches that come back go on as if the conversation had never been interrupted.
    more = [prompt + list(ids) for prompt, ids in zip(prompts, wanted, strict=True)]
    assert [cache[0].offset for cache in got.caches] == [len(tokens) for tokens in more]
    tails = [[7, 8, 9 + i] for i in range(len(prompts))]
    again = mlx_lm.batch_generate(
        model, tokenizer, tails, prompt_caches=got.caches, max_tokens=8, return_token_ids=True, **sizes
    )
    expected = ours(folder, [tokens + tail for tokens, tail in zip(more, tails, strict=True)], 8)
    assert [tuple(ids) for ids in again.token_ids] == expected


def test_logits_of_whole_batches_equal_ours() -> None:
    """What perplexity and evaluate read: with and without a cache, cut, and padded on the right."""
    folder = models.folder()
    model, _ = mlx_lm.load(str(folder))
    llm = models.load("mlx", folder)
    rows = [IDS[:90], IDS[50:140], [*IDS[200:230], *[0] * 60]]
    wanted = np.stack([llm.logits(row) for row in rows])
    tokens = mx.array(rows)
    logits = model(tokens)
    assert logits.dtype == mx.float32
    np.testing.assert_allclose(np.array(logits), wanted, atol=1e-4)
    cache = model.make_cache()
    parts = [model(tokens[:, first : first + 32], cache=cache) for first in range(0, 90, 32)]
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)), wanted, atol=1e-4)


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval, or a stand-in for the two names that mlx-lm's evaluate takes from it."""
    if importlib.util.find_spec("lm_eval") is not None:
        return
    parts = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api.model", "lm_eval.api.registry")}
    vars(parts["lm_eval.api.model"])["LM"] = type("LM", (), {})
    vars(parts["lm_eval.api.registry"])["register_model"] = lambda name: lambda kind: kind
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)


def test_evaluate_scores_and_generates_as_we_do(lm_eval: None) -> None:
    from mlx_lm.evaluate import MLXLM

    harness = MLXLM(str(models.folder()), max_tokens=12, use_chat_template=False)
    llm = models.load("mlx")
    text = models.TEXT

    def logprobs(ids: list[int]) -> np.ndarray:
        """Of each token but the first."""
        z = llm.logits(ids).astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
        return z[np.arange(len(ids) - 1), ids[1:]]

    def request(*args: Any) -> SimpleNamespace:
        return SimpleNamespace(args=args)

    line = text.index("\n")  # mlx-lm takes the tokens of the context for the first ones of the whole
    ids, first = llm.tokenizer.encode(text[:130]), len(llm.tokenizer.encode(text[:line]))
    harness._max_tokens = None
    ((score, is_greedy),) = harness.loglikelihood([request(text[:line], text[line:130])])
    assert score == pytest.approx(logprobs(ids)[first - 1 :].sum(), abs=1e-2)
    assert not is_greedy
    texts = [text[:200], text[40:70], text[:90]]
    rolling = harness.loglikelihood_rolling([request(part) for part in texts])
    assert rolling == pytest.approx([logprobs(llm.tokenizer.encode(part)).sum() for part in texts], abs=1e-2)
    harness._max_tokens = 12
    answers = harness.generate_until([request(part, {"until": ["\0"]}) for part in texts])
    outs = llm.generate(texts, SamplingParams(max_tokens=12))
    assert answers == [harness.tokenizer.decode(list(out.token_ids)) for out in outs]


# -- quantised weights -----------------------------------------------------------------------------------------

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "index_head_dim": 32}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_our_quantised_checkpoints_give_our_tokens(tmp_path: Path, bits: int, tied: bool) -> None:
    source = models.folder(**WIDE, tie_word_embeddings=tied)
    convert(source, tmp_path / "q", quantization=Quantization(group_size=32, bits=bits))
    model, _ = mlx_lm.load(str(tmp_path / "q"))
    assert theirs(model, IDS[:100], 20) == ours(tmp_path / "q", [IDS[:100]], 20)[0]


def test_mlx_lm_quantises_and_reads_back_what_it_wrote(tmp_path: Path) -> None:
    source = models.folder(**WIDE)
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True, q_group_size=32, q_bits=4)
    convert(source, tmp_path / "ours", quantization=Quantization(group_size=32, bits=4))
    models_read = [mlx_lm.load(str(tmp_path / name))[0] for name in ("theirs", "ours")]
    theirs_read, ours_read = (np.array(model(mx.array([IDS[:60]]))) for model in models_read)
    np.testing.assert_allclose(theirs_read, ours_read, atol=1e-3)


# -- refusals --------------------------------------------------------------------------------------------------


def changed_config(tmp_path: Path, **changes: Any) -> str:
    folder = models.save(tmp_path / "model", models.CONFIG)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "unknown config key 'rope_scaling'"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "unknown config key 'auto_map'"),
        ({"sliding_window": 1 << 40}, "sliding_window must be between"),
        ({"quantization": {"group_size": 64, "bits": 3}}, "quantization.bits"),
        ({"quantize_activations": True}, "quantize_activations"),
    ],
)
def test_configs_we_cannot_honour(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        mlx_lm.load(changed_config(tmp_path, **changes))


def test_what_mlx_lm_adds_to_the_config_is_no_unknown_key() -> None:
    model, _ = mlx_lm.load(str(models.folder()), model_config={"quantize_activations": False})
    assert theirs(model, IDS[:5], 3) == ours(models.folder(), [IDS[:5]], 3)[0]


def test_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        mlx_lm.load(changed_config(tmp_path, intermediate_size=models.CONFIG.intermediate_size + 8))


def test_training_and_adapters_are_refused() -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = mlx_lm.load(str(models.folder()))
    model.train()
    with pytest.raises(RequestError, match="clsa train"):
        model(mx.array([IDS[:5]]))
    model.eval()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
    with pytest.raises(BackendError, match=r"LoRALinear.*fuse"):
        model(mx.array([IDS[:5]]))


@pytest.mark.parametrize(
    ("found", "match"), [(None, "mlx-lm is not installed; pip install"), ("0.31.3", "0.31.3 is older than 0.32; pip")]
)
def test_no_mlx_lm_is_one_sentence(monkeypatch: pytest.MonkeyPatch, found: str | None, match: str) -> None:
    def version(_: str) -> str:
        if found is None:
            raise PackageNotFoundError("mlx-lm")
        return found

    monkeypatch.setattr(registration, "version", version)
    with pytest.raises(BackendError, match=match) as caught:
        registration._register()
    assert "\n" not in str(caught.value)
