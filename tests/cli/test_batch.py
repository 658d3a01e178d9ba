"""`clsa generate --input --output`: the OpenAI batch form, errors per line, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clsa import EngineConfig, SamplingParams
from clsa_cli import batch
from tests.cli.conftest import Run
from tests.cli.fake import FakeLLM

CHAT = "/v1/chat/completions"


class Files:
    def __init__(self, folder: Path, run: Run) -> None:
        self.requests, self.results, self.start = folder / "in.jsonl", folder / "out.jsonl", run

    def run(self, *options: str) -> Any:
        return self.start("generate", "--input", str(self.requests), "--output", str(self.results), *options)

    def write(self, *lines: object) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.requests.write_text("\n".join(texts) + "\n", encoding="utf-8", errors="surrogateescape")

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    def ids(self) -> list[str]:
        return [line["custom_id"] for line in self.read()]


@pytest.fixture
def files(tmp_path: Path, run: Run) -> Files:
    return Files(tmp_path, run)


def request(custom_id: object, prompt: object = "x", **body: object) -> dict[str, object]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "any", "prompt": prompt, **body},
    }


def test_the_size_of_a_step_is_left_to_the_engine_or_said(files: Files, fake: FakeLLM) -> None:
    files.write(request("a"))
    assert files.run().exit_code == 0
    assert fake.loaded_with[-1]["engine"] == EngineConfig()
    files.write(request("b"))
    assert files.run("--max-num-seqs", "7", "--max-tokens-per-step", "99").exit_code == 0
    assert fake.loaded_with[-1]["engine"] == EngineConfig(max_num_seqs=7, max_tokens_per_step=99)
    files.write(request("c"))
    assert files.run("--max-num-seqs", "0").exit_code == 1, "out of bounds"
    refused = files.start("generate", "--prompt", "x", "--max-num-seqs", "2")
    assert refused.exit_code == 2 and "--max-num-seqs needs --input" in refused.stderr


def test_results_have_the_openai_form(files: Files, fake: FakeLLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat = {"custom_id": "b", "method": "POST", "url": CHAT, "body": {"messages": messages, "temperature": 1}}
    files.write(request("a", "one", max_tokens=5, stop="END", n=1), chat, request("c", [1, 2, 3], seed=None))
    result = files.run("--seed", "7", "--model", "m", "--json", "--ordered")
    assert result.exit_code == 0
    assert fake.asked == ["one", [2], [1, 2, 3]]
    assert fake.params == [
        SamplingParams(max_tokens=5, seed=7, stop=("END",)),
        SamplingParams(temperature=1.0, seed=7),
        SamplingParams(seed=7),
    ]
    first, second, _ = files.read()
    assert first["response"]["body"].pop("created") > 0
    assert first == {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "body": {
                "id": "cmpl-1",
                "object": "text_completion",
                "model": "m",
                "choices": [{"index": 0, "text": "Hello world", "finish_reason": "stop"}],
                "usage": {
                    "prompt_tokens": 5,
                    "completion_tokens": 2,
                    "total_tokens": 7,
                    "prompt_tokens_details": {"cached_tokens": 2},
                },
            },
        },
        "error": None,
    }
    assert second["response"]["body"]["choices"][0]["message"] == {"role": "assistant", "content": "Hello world"}
    assert json.loads(result.stdout) == {
        "completed": 3,
        "failed": 0,
        "skipped": 0,
        "prompt_tokens": 15,
        "generation_tokens": 6,
        "cached_tokens": 6,
    }
    assert "3 answers, 0 errors, 0 there before" in result.stderr


def test_finished_ids_are_not_run_again(files: Files, fake: FakeLLM) -> None:
    files.write(request("a"), request("b", "refuse"), "{torn")
    assert files.run("--ordered").exit_code == 0
    files.write(request("a"), request("b", "refuse"), "{torn", request("c", "new"))
    fake.asked.clear()
    assert files.run().exit_code == 0
    assert fake.asked == ["new"]
    assert files.ids() == ["a", "b", None, "c"]
    assert files.run().stderr.endswith("0 answers, 0 errors, 4 there before\n")


@pytest.mark.parametrize("keep", [1, 12, 40, -1])
def test_a_torn_last_result_is_run_again(files: Files, fake: FakeLLM, keep: int) -> None:
    files.write(request("a"), request("b", "two"))
    assert files.run("--ordered").exit_code == 0
    lines = files.results.read_bytes().splitlines(keepends=True)
    files.results.write_bytes(lines[0] + lines[1][:keep])
    fake.asked.clear()
    assert files.run().exit_code == 0
    assert (files.ids(), fake.asked) == (["a", "b"], ["two"])


@pytest.mark.parametrize("content", ["precious", "precious\n", '{"custom_id": "a"}\n', "[1]\n", "\n"])
def test_a_file_that_holds_no_results_is_left_alone(files: Files, fake: FakeLLM, content: str) -> None:
    files.write(request("a"))
    files.results.write_text(content)
    result = files.run()
    assert (result.exit_code, files.results.read_text(), fake.loaded_with) == (1, content, ())
    assert "line 1 is no batch result" in result.stderr


def test_files_that_cannot_be(files: Files, fake: FakeLLM, run: Run, tmp_path: Path) -> None:
    files.write(request("a"))
    same, before = str(files.requests), files.requests.read_bytes()
    for args in (
        ["--input", same, "--output", same],
        ["--input", same, "--output", str(tmp_path / "no" / "out.jsonl")],
        ["--input", same, "--output", str(tmp_path)],
        ["--input", same],
        ["--input", same, "--output", str(files.results), "--prompt", "x"],
        ["--input", same, "--output", str(files.results), "--json", "--logprobs", "1"],
        ["--input", same, "--output", str(files.results), "--save-cache", str(tmp_path / "cache")],
        ["--prompt", "x", "--ordered"],
        ["--prompt", "x", "--save-cache", str(tmp_path / "no" / "cache")],
    ):
        result = run("generate", *args)
        assert (result.exit_code, fake.loaded_with, files.requests.read_bytes()) == (2, (), before), args
        assert result.stderr.startswith("error: ")
    assert not files.results.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "line 1 is not valid JSON"),
        ('{"custom_id": "a", "custom_id": "b"}', "occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ('"text"', "must be a JSON object"),
        ("\udcff\udcfe", "not valid JSON"),
        (request(7), "custom_id must be a string"),
        (request(""), "custom_id must be a string"),
        (request("x" * 513), "custom_id must be a string"),
        (request("a") | {"method": "GET"}, "method must be POST"),
        (request("a") | {"url": "/v1/embeddings"}, "url must be"),
        (request("a") | {"url": CHAT}, "body has no messages"),
        (request("a") | {"body": [1]}, "body must be an object"),
        (request("a") | {"extra": 1}, "unknown key 'extra'"),
        (request("a", None), "body has no prompt"),
        (request("a", ["a", "b"]), "prompt must be one text or one list"),
        (request("a", [True]), "prompt must be one text or one list"),
        (request("a", tools=[]), "'tools' is not supported"),
        (request("a", n=2), "'n' is not supported with the value 2"),
        (request("a", stream=True), "'stream' is not supported"),
        (request("a", frequency_penalty=0.5), "'frequency_penalty' is not supported"),
        (request("a", max_tokens=0), "max_tokens must be between"),
        (request("a", max_tokens=10**30), "max_tokens must be between"),
        (request("a", max_tokens="5"), "max_tokens must be an integer"),
        (request("a", temperature=float("nan")), "not valid JSON"),
        (request("a", top_p=1e400), "not valid JSON"),
        ('{"custom_id": "a", "body": {"prompt": "x", "top_p": 1e999}}', "top_p must be a finite number"),
        (request("a", stop=7), "stop must be a string or a list"),
        (request("a", stop=[""]), "stop must be at most 16 strings"),
        (request("a", stop_token_ids=3), "stop_token_ids must be a list"),
        (request("a", ignore_eos=1), "ignore_eos must be true or false"),
        ({"custom_id": "a", "url": CHAT, "body": {"messages": "hi"}}, "messages must be a list"),
        (request("a", "refuse me"), "is refused"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 and value.isprintable() else None,
)
def test_a_bad_line_is_its_own_error(files: Files, fake: FakeLLM, line: object, words: str) -> None:
    files.write(line, "", request("good"))
    assert files.run("--ordered").exit_code == 0
    bad, good = files.read()
    assert words in bad["error"]["message"]
    assert bad["id"] == "batch_req_1" and bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"] == bad["error"]
    assert (good["custom_id"], good["id"], good["error"]) == ("good", "batch_req_3", None)
    assert fake.asked == ["x"]


def test_an_id_that_occurs_twice(files: Files, fake: FakeLLM) -> None:
    files.write(request("a", "first"), request("a", "second"))
    assert files.run("--ordered").exit_code == 0
    assert [line["error"] and line["error"]["message"] for line in files.read()] == [
        None,
        "custom_id 'a' occurs twice; every line needs its own",
    ]
    assert fake.asked == ["first"]
    # Whichever of the two was not written yet is what is missing.
    lines = files.results.read_bytes().splitlines(keepends=True)
    for kept, other in (lines, reversed(lines)):
        files.results.write_bytes(kept)
        assert files.run().exit_code == 0
        assert json.loads(files.results.read_bytes().splitlines()[1])["error"] == json.loads(other)["error"]
        assert files.run().stderr.endswith("0 answers, 0 errors, 2 there before\n")


def test_a_step_that_fails_is_an_error_of_its_line(files: Files, fake: FakeLLM) -> None:
    files.write(request("a", "fail"), request("b"))
    assert files.run("--ordered").exit_code == 0
    bad, good = files.read()
    assert (bad["response"]["status_code"], bad["error"]["message"]) == (500, "the step failed")
    assert good["error"] is None


def test_results_are_written_as_they_finish(files: Files, fake: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = fake._note, []

    def note(prompt: Any, params: SamplingParams) -> None:
        seen.append(len(files.read()))
        if len(seen) == 6:
            raise KeyboardInterrupt
        original(prompt, params)

    monkeypatch.setattr(fake, "_note", note)
    files.write(*(request(str(i)) for i in range(9)))
    assert files.run().exit_code == 130
    assert seen == [0, 0, 1, 2, 3, 4]
    assert files.ids() == ["1", "2", "3", "4"]
    monkeypatch.setattr(fake, "_note", original)
    assert files.run().exit_code == 0
    assert sorted(files.ids()) == [str(i) for i in range(9)]


def test_ordered(files: Files, fake: FakeLLM) -> None:
    files.write(*(request(str(i), "refuse" if i % 3 else "x") for i in range(9)))
    assert files.run("--ordered").exit_code == 0
    assert files.ids() == [str(i) for i in range(9)]


def test_only_one_process_may_write(files: Files, fake: FakeLLM) -> None:
    files.write(request("a"))
    first = batch.Batch(files.requests, files.results)
    result = files.run()
    assert (result.exit_code, files.results.read_text()) == (1, "")
    assert "another process is writing to" in result.stderr
    first.run(fake, "m", SamplingParams())  # type: ignore[arg-type]
    assert files.ids() == ["a"]
    assert files.run().exit_code == 0


def test_a_line_without_end_is_refused(files: Files, fake: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_LINE_BYTES", 1000)
    files.write(request("a"), request("b", "x" * 2000))
    result = files.run()
    assert result.exit_code == 1 and "line 2 is longer than 1000 bytes" in result.stderr
