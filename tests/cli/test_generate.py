"""`clsa generate` with one prompt: what goes to stdout, and what the options become."""

from __future__ import annotations

import json
import signal

import pytest

from clsa import EngineConfig, SamplingParams
from clsa_cli.generate import reads
from tests.cli.conftest import Run, Start
from tests.cli.fake import FakeLLM


def test_text_goes_to_stdout_and_the_choice_of_backend_to_stderr(run: Run, fake: FakeLLM) -> None:
    result = run("generate", "--prompt", "Say hello")
    assert (result.exit_code, result.stdout) == (0, "Hello world\n")
    assert result.stderr == f"backend: {fake.why}\n"
    assert (fake.asked, fake.params) == (["Say hello"], [SamplingParams()])
    assert fake.loaded_with == ("demo", "auto", None, None, {"engine": EngineConfig(max_num_seqs=1)})
    assert fake.closed


def test_a_backend_that_was_asked_for_is_not_explained(run: Run, fake: FakeLLM) -> None:
    result = run(
        "generate", "--prompt", "x", "--model", "m", "--backend", "mlx", "--device", "gpu", "--dtype", "float16"
    )
    assert result.stderr == ""
    assert fake.loaded_with[:4] == ("m", "mlx", "gpu", "float16")


def test_options_become_sampling_parameters(run: Run, fake: FakeLLM) -> None:
    options = "--max-tokens 7 --temp 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 --seed 3 --repetition-penalty 1.1"
    assert run("generate", "--prompt", "x", *options.split(), "--stop", "END", "--stop", "\n\n").exit_code == 0
    assert fake.params == [
        SamplingParams(
            max_tokens=7,
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.1,
            seed=3,
            repetition_penalty=1.1,
            stop=("END", "\n\n"),
        )
    ]


@pytest.mark.parametrize("no_stream", [[], ["--no-stream"]])
@pytest.mark.parametrize("say", [["a\n"], ["[bold]", "x[/bold] :smile: ", "[/]"], ["\x1b[31m", "\r\x07"], ["", ""]])
def test_text_is_printed_as_it_is(run: Run, fake: FakeLLM, say: list[str], no_stream: list[str]) -> None:
    fake.say = say
    text = "".join(say)
    assert run("generate", "--prompt", "x", *no_stream).stdout_bytes == (text.rstrip("\n") + "\n").encode()


def test_prompt_from_stdin_is_taken_whole(run: Run, fake: FakeLLM) -> None:
    assert run("generate", "--prompt", "-", stdin="def f():\n  \n").exit_code == 0
    assert fake.asked == ["def f():\n  \n"]


@pytest.mark.parametrize(
    ("stdin", "words"), [(b"", "empty"), (b"ab\xff", "stdin is not UTF-8 text: invalid start byte at byte 2")]
)
def test_stdin_that_is_no_prompt(run: Run, fake: FakeLLM, stdin: bytes, words: str) -> None:
    result = run("generate", "--prompt", "-", stdin=stdin)
    assert (result.exit_code, fake.loaded_with) == (2, ())
    assert words in result.stderr


def test_json_is_all_of_stdout(run: Run, fake: FakeLLM) -> None:
    result = run("generate", "--prompt", "x", "--json", "--seed", "5", "--model", "m")
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout) == {
        "text": "Hello world",
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "generation_tokens": 2,
        "prompt_tps": 100.0,
        "generation_tps": 50.0,
        "peak_memory": 12_000_000,
        "backend": "fake",
        "device": "cpu (pretended)",
        "dtype": "float32",
        "kv_dtype": None,
        "index_dtype": None,
        "weight_dtype": None,
        "model": "m",
        "seed": 5,
    }


def test_logprobs(run: Run, fake: FakeLLM) -> None:
    result = run("generate", "--prompt", "x", "--json", "--logprobs", "2")
    answer = json.loads(result.stdout)
    assert fake.params[0].logprobs == 2
    assert answer["logprobs"] == [{"token": i, "logprob": -0.5, "top": [[7, -0.5], [8, None]]} for i in range(2)]
    assert (answer["text"], answer["generation_tokens"], answer["generation_tps"]) == ("Hello world", 2, 50.0)


def test_report_says_what_was_read(run: Run, fake: FakeLLM) -> None:
    result = run("generate", "--prompt", "Say", "--report")
    assert result.stdout == "Hello world\n"
    words = " ".join(result.stderr.split())
    for part in (
        "10 tokens (4 cached), 100.0 tokens/s",
        "2 tokens (stop), 50.0 tokens/s",
        fake.why,
        # 2 KV heads of 8, keys and values, and an index of 8, in float32; all 4 layers in the other case
        "160 bytes per token; a Transformer of these sizes keeps 512",
        "read 8 of the 11 tokens it saw, in 2 layers",
        "12.0 MB",
    ):
        assert part in words
    assert "Say" in result.stderr


def test_reads_counts_what_each_step_saw() -> None:
    assert reads("FSD", 4, 3, 3) == (
        "the last step read 4 of the 5 tokens it saw, in 2 layers; all steps 11 of 12 (92%); 1 layer read all"
    )
    assert reads("D", 4, 3, 2) == "every step read all it saw, at last 4 tokens, in 1 layer"
    assert reads("", 4, 3, 2) == "no step read a memory"


def test_ctrl_c_ends_a_process_with_130_and_what_was_said(start: Start) -> None:
    child = start("generate", "--prompt", "x", fake="FakeLLM(['tick '] * 1000, delay=0.02)")
    assert child.stdout is not None
    assert child.stdout.read(5) == b"tick "
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=30)
    assert child.returncode == 130
    assert stdout.endswith(b"\n") and b"Traceback" not in stderr
