"""The frame around all commands: help, version, exit codes, and one sentence for every error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import clsa
from clsa_cli import output
from tests.cli.conftest import PATH, ROOT, Run, Start
from tests.cli.fake import FakeLLM

SAMPLING = ["--max-tokens", "--temp", "--top-p", "--top-k", "--min-p", "--seed", "--repetition-penalty", "--stop"]
MACHINE = ["--model", "--backend", "--device", "--dtype"]
STATE = ["--max-tokens-in-memory", "--kv-dtype", "--index-dtype", "--weight-dtype"]
OPTIONS = {
    "generate": [
        *("--prompt", "--input", "--output", "--json", "--report", "--no-stream", "--logprobs", "--ordered"),
        *("--load-cache", "--save-cache", "--salt"),
        *SAMPLING,
        *MACHINE,
        *STATE,
    ],
    "chat": ["--system", "--file", "--cache-dir", "--cache-bytes", "--plain", *SAMPLING, *MACHINE, *STATE],
    "train": ["--recipe", "--data", "--out", "--resume", "--max-minutes", *MACHINE],
    "eval": ["--data", "--lengths", "--against", "--output", "--batch-tokens", "--max-windows", *MACHINE],
    "convert": ["--model", "--out", "--quantize", "--group-size", "--dtype", "--backend", "--json"],
    "info": ["--model", "--backend", "--json", *STATE],
}


def clsa_process(*args: str, code: str = "from clsa_cli.main import main; main()") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PATH), "COLUMNS": "120"}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(run: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = run(command, "--help")
    assert result.exit_code == 0
    assert [option for option in OPTIONS[command] if f"{option} " not in result.stdout] == []


def test_help_lists_the_commands(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert [command for command in OPTIONS if command not in result.stdout] == []


def test_without_a_command_it_shows_help_and_that_is_bad_usage(run: Run) -> None:
    result = run()
    assert (result.exit_code, "generate" in result.stdout) == (2, True)


def test_version(run: Run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"clsa {clsa.__version__}\n")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import json, sys\nfrom clsa_cli.main import app\n"
        "try:\n    app()\nfinally:\n    print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    modules = json.loads(clsa_process("--help", code=code).stderr)
    loaded = {name.partition(".")[0] for name in modules}
    heavy = {"numpy", "torch", "mlx", "tokenizers", "huggingface_hub", "jinja2", "safetensors", "triton"}
    assert loaded & heavy == set()
    assert len(modules) < 450, "each takes its time to import"


@pytest.mark.parametrize(
    "args",
    [
        ["--bogus"],
        ["frob"],
        ["generate"],
        ["generate", "--prompt"],
        ["generate", "--prompt", "x", "--bogus"],
        ["generate", "--prompt", "x", "extra"],
        ["generate", "--prompt", "x", "--max-tokens", "many"],
        ["generate", "--prompt", "x", "--max-tokens", "0"],
        ["generate", "--prompt", "x", "--max-tokens", "9" * 30],
        ["generate", "--prompt", "x", "--max-tokens", "9" * 5000],
        ["generate", "--prompt", "x", "--seed", "-1"],
        ["generate", "--prompt", "x", "--seed", str(1 << 64)],
        ["generate", "--prompt", "x", "--top-k", str(1 << 40)],
        ["generate", "--prompt", "x", "--temp", "nan"],
        ["generate", "--prompt", "x", "--temp", "inf"],
        ["generate", "--prompt", "x", "--temp", "-1"],
        ["generate", "--prompt", "x", "--top-p", "nan"],
        ["generate", "--prompt", "x", "--min-p", "2"],
        ["generate", "--prompt", "x", "--repetition-penalty", "0"],
        ["generate", "--prompt", "x", "--stop", ""],
        ["generate", "--prompt", "x", "--dtype", "int3"],
        ["generate", "--prompt", "x", "--logprobs", "3"],
        ["generate", "--prompt", "x", "--json", "--logprobs", "-1"],
        ["generate", "--prompt", ""],
        ["generate", "--prompt", "\udc80"],
        ["generate", "--input", "/nowhere/in.jsonl", "--output", "out.jsonl"],
        ["generate", "--output", "out.jsonl"],
        ["chat", "--temp", "nan"],
        ["chat", "--system", ""],
    ],
    ids=lambda args: " ".join(args)[:50].encode("ascii", "replace").decode(),
)
def test_bad_usage_is_one_sentence_and_exit_2_and_loads_nothing(run: Run, fake: FakeLLM, args: list[str]) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert len(result.stderr) < 2200
    assert fake.loaded_with == ()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (clsa.CheckpointError("/x/config.json: 'a' is missing"), 1, "/x/config.json: 'a' is missing"),
        (clsa.BackendError("no GPU here"), 1, "no GPU here"),
        (clsa.RequestError("the prompt is too long"), 2, "the prompt is too long"),
        (FileNotFoundError(2, "No such file or directory", "/x/y"), 1, "/x/y: No such file or directory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, 'pip install "clsa[train]"'),
        (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError: division by zero (CLSA_DEBUG=1"),
        (clsa.ClsaError("two\nlines \x1b[31m[bold]red[/bold]"), 1, "two lines \\x1b[31m[bold]red[/bold]"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_are_one_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.delenv("CLSA_DEBUG", raising=False)
    monkeypatch.setitem(vars(clsa), "load", load)
    result = run("generate", "--prompt", "x")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ") and words in result.stderr and result.stderr.count("\n") == 1


def test_debug_shows_where_an_unexpected_error_came_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLSA_DEBUG", "1")
    monkeypatch.setitem(vars(clsa), "load", lambda *args, **kwargs: 1 // 0)
    assert isinstance(run("generate", "--prompt", "x").exception, ZeroDivisionError)
    monkeypatch.setitem(vars(clsa), "load", lambda *args, **kwargs: (_ for _ in ()).throw(clsa.ClsaError("known")))
    assert run("generate", "--prompt", "x").stderr == "error: known\n"


def test_ctrl_c_exits_130_without_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(clsa), "load", load)
    result = run("generate", "--prompt", "x")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


def test_broken_pipe_is_silent(start: Start) -> None:
    child = start("generate", "--prompt", "x", fake="FakeLLM(['word '] * 100_000)")
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.read(4) == b"word"
    child.stdout.close()
    assert child.stderr.read().decode() == "backend: " + FakeLLM.why + "\n"
    assert child.wait(30) == 1


def test_letters_that_stdout_lacks_do_not_end_the_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    child = start("generate", "--prompt", "x", fake="FakeLLM(['caf\\xe9'])")
    stdout, _ = child.communicate(timeout=30)
    assert (child.returncode, stdout) == (0, b"caf\\xe9\n")


def test_json_has_a_word_for_every_number() -> None:
    line = output.json_line({"a": float("nan"), "b": [1.5, float("inf")], "c": "é\u2028"})
    assert json.loads(line) == {"a": None, "b": [1.5, None], "c": "é\u2028"}
    assert line.isascii() and line.count("\n") == 1


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(1, "1 byte"), (999, "999 bytes"), (12_345, "12.3 kB"), (999_960, "1.0 MB"), (5 * 10**15, "5,000.0 TB")],
)
def test_sizes(num_bytes: int, words: str) -> None:
    assert output.size(num_bytes) == words
