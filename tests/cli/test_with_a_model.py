"""The commands over the real thing: a tiny random checkpoint on the numpy backend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clsa.checkpoint import save_checkpoint
from clsa.params import init_params
from tests.cli.conftest import Run
from tests.cli.fake import CONFIG

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [Path(__file__).read_text()],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    files = [folder / "tokenizer.json", folder / "chat_template.jinja"]
    # Sharp logits, so that a greedy answer does not turn on rounding.
    params = {name: 8 * array if array.ndim == 2 else array for name, array in init_params(CONFIG, 0).items()}
    save_checkpoint(folder / "model", CONFIG, params, tokenizer_files=files)
    return str(folder / "model")


def test_generate_streamed_and_whole_and_json_agree(run: Run, model: str) -> None:
    command = ["generate", "--model", model, "--backend", "numpy", "--prompt", "def f():", "--max-tokens", "20"]
    answer = json.loads(run(*command, "--json").stdout)
    assert (answer["finish_reason"], answer["generation_tokens"], answer["backend"]) == ("length", 20, "numpy")
    assert answer["prompt_tokens"] > 0 and answer["peak_memory"] > 0 and answer["generation_tps"] > 0
    text = answer["text"] + ("" if answer["text"].endswith("\n") else "\n")
    assert run(*command).stdout == text
    assert run(*command, "--no-stream").stdout == text
    with_logprobs = json.loads(run(*command, "--json", "--logprobs", "2").stdout)
    assert with_logprobs["text"] == answer["text"]
    assert [item["token"] == item["top"][0][0] for item in with_logprobs["logprobs"]] == [True] * 20


def test_report(run: Run, model: str) -> None:
    result = run(
        "generate", "--model", model, "--prompt", "x " * 20, "--max-tokens", "4", "--backend", "numpy", "--report"
    )
    assert result.exit_code == 0
    assert re.search(r"the last step read 8 of the \d\d tokens it saw, in 2 layers", " ".join(result.stderr.split()))


def test_a_prompt_that_is_too_long_is_refused(run: Run, model: str) -> None:
    result = run("generate", "--model", model, "--backend", "numpy", "--prompt", "word " * 1000)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args", [["--backend", "frob"], ["--backend", "numpy", "--device", "frob"], ["--model", "/nowhere"]]
)
def test_what_cannot_be_loaded(run: Run, model: str, args: list[str]) -> None:
    result = run("generate", "--model", model, "--prompt", "x", *args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_chat_finds_the_state_of_earlier_turns(run: Run, model: str) -> None:
    message = "tell me about the numbers from one to a hundred, please"
    result = run("chat", "--model", model, "--backend", "numpy", "--max-tokens", "80", stdin=f"{message}\n{message}\n")
    assert result.exit_code == 0
    cached = [int(number) for number in re.findall(r"tokens/s, (\d+) of", result.stderr)]
    assert len(cached) == 2 and cached[0] == 0 and cached[1] >= 64


def test_batch_gives_the_text_of_single_runs(run: Run, model: str, tmp_path: Path) -> None:
    prompts = ["def f():", "import", "word " * 1000, "class A:"]
    lines = [{"custom_id": str(i), "body": {"prompt": prompt, "max_tokens": 8}} for i, prompt in enumerate(prompts)]
    lines.append({"custom_id": "chat", "body": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}})
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["generate", "--model", model, "--backend", "numpy"]
    assert run(*common, "--input", str(requests), "--output", str(results)).exit_code == 0
    found = {line["custom_id"]: line for line in map(json.loads, results.read_text().splitlines())}
    assert found.keys() == {"0", "1", "2", "3", "chat"}
    assert found["2"]["response"]["status_code"] == 400
    for i in (0, 1, 3):
        alone = json.loads(run(*common, "--prompt", prompts[i], "--max-tokens", "8", "--json").stdout)
        assert found[str(i)]["response"]["body"]["choices"][0]["text"] == alone["text"]
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"


def test_info(run: Run, model: str) -> None:
    result = run("info", "--model", model, "--backend", "numpy", "--json")
    facts = json.loads(result.stdout)
    assert facts["model"]["parameters"] > 0 and facts["backends"][0]["devices"][0]["usable"]
    assert "numpy on cpu" in facts["choice"]


@pytest.mark.mlx
def test_the_state_of_a_prompt_in_a_file(run: Run, model: str, tmp_path: Path) -> None:
    cache, text = str(tmp_path / "cache"), "def numbers(first, last):\n" * 12
    common = ["generate", "--model", model, "--backend", "mlx", "--device", "cpu", "--max-tokens", "8", "--json"]
    first = run(*common, "--prompt", text, "--save-cache", cache, "--salt", "mine")
    assert first.exit_code == 0 and re.search(r"wrote the state of \d+ tokens", first.stderr)
    command = [*common, "--prompt", text + "    return", "--load-cache", cache]
    found = json.loads(run(*command, "--salt", "mine").stdout)
    assert found["cached_tokens"] >= 64
    assert found["text"] == json.loads(run(*command[:-2]).stdout)["text"]
    refused = run(*command)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "was written with another salt" in refused.stderr
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(json.dumps({"custom_id": "a", "body": {"prompt": text}}))
    batch = ["--input", str(requests), "--output", str(results), "--load-cache", cache, "--salt", "mine"]
    summary = json.loads(run(*common, *batch).stdout)
    assert summary["completed"] == 1 and summary["cached_tokens"] >= 64
