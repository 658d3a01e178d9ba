"""A file of requests in the OpenAI batch form, run in groups; results are appended and survive an interruption.

A request line is `{"custom_id", "method", "url", "body"}`, a result line `{"id", "custom_id", "response", "error"}`.
What is wrong with a line becomes its result; only what is wrong with a file stops the run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from clsa import ClsaError, RequestError
from clsa.config import SamplingParams, show
from clsa_cli import output

if TYPE_CHECKING:
    from clsa.llm import LLM
    from clsa.outputs import RequestOutput
    from clsa.tokenizer import Tokenizer

GROUP = 256  # lines that run together and are written together
MAX_LINE_BYTES = 1 << 26
MAX_ID = 512
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_ID = "batch_req_"
_HEAD = b'{"id": "' + _ID.encode()  # how every result line begins
_PARAMS = {
    name: name
    for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "stop")
} | {"stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos", "max_completion_tokens": "max_tokens"}
# Keys that clients always send: accepted with the value that asks for nothing.
_NEUTRAL = {"n": 1, "best_of": 1, "stream": False, "echo": False, "logprobs": False, "top_logprobs": 0}
_NEUTRAL |= {"frequency_penalty": 0, "presence_penalty": 0}
_NOT_OURS = {"model", "user", "metadata"}

_Key = str | tuple[str]


@dataclass(frozen=True, slots=True)
class _Job:
    """One line: ready to run, or with the reason why not."""

    id: str
    custom_id: str | None
    chat: bool = False
    prompt: str | list[int] = ""
    params: SamplingParams = field(default_factory=SamplingParams)
    problem: str | None = None


@dataclass(slots=True)
class Summary:
    """What a run did; `skipped` lines had a result already."""

    completed: int = 0
    failed: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0


class Batch:
    """A file of requests and the file of its results."""

    def __init__(self, requests: Path, results: Path) -> None:
        """Look at both files, and cut off a result that an interrupted run left half written.

        Raises ClsaError if they are one file, or if `results` holds something else than results.
        """
        if results.exists() and results.samefile(requests):
            raise RequestError(f"--input and --output are the same file, {requests}; give results a file of their own")
        if not results.absolute().parent.is_dir():
            raise RequestError(f"there is no folder {results.absolute().parent} for --output")
        self.requests, self.results = requests, results
        self.done = _finished(results) if results.exists() else set()

    def run(self, llm: LLM, model: str, defaults: SamplingParams) -> Summary:
        """Run what has no result yet. `defaults` holds for whatever a body leaves out."""
        summary = Summary()
        with self.results.open("ab") as out, self._progress() as advance:
            jobs = self._jobs(llm.tokenizer, defaults, summary)
            while group := list(islice(jobs, GROUP)):
                lines = [_result(job, answer, model) for job, answer in _answers(llm, group)]
                self._append(out, lines)
                for line in lines:
                    _add(summary, line)
                advance(summary)
            advance(summary)
        return summary

    def _jobs(self, tokenizer: Tokenizer, defaults: SamplingParams, summary: Summary) -> Iterator[_Job]:
        seen: set[_Key] = set()
        for number, line in _lines(self.requests):
            if not line.strip():
                continue
            job = _job(number, line, tokenizer, defaults)
            key = _key(job.custom_id, job.id)
            if key in self.done:
                summary.skipped += 1
                continue
            if key in seen:
                job = replace(job, problem=f"custom_id {show(job.custom_id)} occurs twice; every line needs its own")
            seen.add(key)
            yield job

    def _append(self, out: BinaryIO, lines: Iterable[Mapping[str, Any]]) -> None:
        try:
            out.write("".join(map(output.json_line, lines)).encode())
            out.flush()
            os.fsync(out.fileno())
        except OSError as error:
            raise ClsaError(
                f"{self.results} cannot be written: {error.strerror}; the same command goes on from here"
            ) from None

    @contextmanager
    def _progress(self) -> Iterator[Callable[[Summary], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        total = sum(1 for _, line in _lines(self.requests) if line.strip())
        columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=output.console(stderr=True), redirect_stdout=False) as progress:
            task = progress.add_task("requests", total=total)
            yield lambda done: progress.update(task, completed=done.completed + done.failed + done.skipped)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ClsaError(f"{path} line {number} is longer than {MAX_LINE_BYTES} bytes; split the request")
            yield number, line


def _key(custom_id: str | None, line_id: str) -> _Key:
    """What names a line in both files: its custom_id, or its number where it has none that is valid."""
    return (line_id,) if custom_id is None else custom_id


def _finished(results: Path) -> set[_Key]:
    """Keys of the lines that have a result. A last line without its end is cut off, if it began as a result."""
    done: set[_Key] = set()
    start = 0
    for number, line in _lines(results):
        whole = line.endswith(b"\n")
        key = _result_key(line) if whole else None
        if key is not None:
            done.add(key)
        elif not whole and line[: len(_HEAD)] == _HEAD[: len(line)]:
            os.truncate(results, start)
        else:
            raise ClsaError(f"{results} line {number} is no batch result; choose another --output")
        start += len(line)
    return done


def _result_key(line: bytes) -> _Key | None:
    try:
        result = json.loads(line)
        custom_id, line_id = result["custom_id"], result["id"]
        valid = "response" in result and isinstance(line_id, str) and isinstance(custom_id, (str, type(None)))
        return _key(custom_id, line_id) if valid else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _job(number: int, line: bytes, tokenizer: Tokenizer, defaults: SamplingParams) -> _Job:
    from clsa.files import parse_json

    job = _Job(f"{_ID}{number}", None)
    try:
        request = parse_json(line, f"line {number}")
        custom_id = request.get("custom_id")
        if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID:
            raise RequestError(f"custom_id must be a string of 1 to {MAX_ID} characters, got {show(custom_id)}")
        job = replace(job, custom_id=custom_id)
        body, chat = _body(request)
        params = _params(body, defaults)
        prompt = tokenizer.encode_chat(body["messages"]) if chat else _prompt(body["prompt"])
        return replace(job, chat=chat, prompt=prompt, params=params)
    except ClsaError as error:
        return replace(job, problem=str(error))


def _body(request: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    if unknown := set(request) - {"custom_id", "method", "url", "body"}:
        raise RequestError(f"unknown key {', '.join(map(show, sorted(unknown)))}")
    body, method = request.get("body"), request.get("method", "POST")
    if not isinstance(body, dict):
        raise RequestError(f"body must be an object, got {show(body)}")
    if method != "POST":
        raise RequestError(f"method must be POST, got {show(method)}")
    url = request.get("url", _CHAT if "messages" in body else _COMPLETIONS)
    if url not in (_CHAT, _COMPLETIONS):
        raise RequestError(f"url must be {_CHAT} or {_COMPLETIONS}, got {show(url)}")
    wanted = "messages" if url == _CHAT else "prompt"
    if body.get(wanted) is None:
        raise RequestError(f"body has no {wanted}, which {url} needs")
    known = {wanted} | set(_PARAMS) | set(_NEUTRAL) | _NOT_OURS
    for key, value in body.items():
        if key not in known or (key in _NEUTRAL and value is not None and value != _NEUTRAL[key]):
            raise RequestError(f"body key {show(key)} is not supported with the value {show(value)}")
    return body, url == _CHAT


def _params(body: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    given = {_PARAMS[key]: body[key] for key in _PARAMS if body.get(key) is not None}
    if not isinstance(given.get("stop", ""), (str, list)):
        raise RequestError(f"stop must be a string or a list of strings, got {show(given['stop'])}")
    if not isinstance(given.get("stop_token_ids", []), list):
        raise RequestError(f"stop_token_ids must be a list of ids, got {show(given['stop_token_ids'])}")
    if not isinstance(given.get("ignore_eos", False), bool):
        raise RequestError(f"ignore_eos must be true or false, got {show(given['ignore_eos'])}")
    return replace(defaults, **given)


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return prompt
    raise RequestError(f"prompt must be one text or one list of token ids, got {show(prompt)}")


def _answers(llm: LLM, group: list[_Job]) -> Iterator[tuple[_Job, RequestOutput | None]]:
    """Run the jobs that can run, together; those that the model refuses come back with the reason."""
    ready = [job for job in group if job.problem is None]
    answers = dict(_generate(llm, ready))
    for job in group:
        answer = answers.get(job.id)
        yield (replace(job, problem=answer), None) if isinstance(answer, str) else (job, answer)


def _generate(llm: LLM, jobs: list[_Job]) -> Iterator[tuple[str, RequestOutput | str]]:
    if not jobs:
        return
    try:
        outputs = llm.generate([job.prompt for job in jobs], [job.params for job in jobs])
        yield from ((job.id, made) for job, made in zip(jobs, outputs, strict=True))
    except RequestError as error:  # raised before anything ran, for the first job it cannot take: halves find it
        if len(jobs) == 1:
            yield jobs[0].id, str(error)
        else:
            middle = len(jobs) // 2
            yield from _generate(llm, jobs[:middle])
            yield from _generate(llm, jobs[middle:])


def _result(job: _Job, answer: RequestOutput | None, model: str) -> dict[str, Any]:
    problem = job.problem if answer is None else answer.error
    if problem is not None:
        status, code = (400, "invalid_request") if answer is None else (500, "server_error")
        error = {"code": code, "message": output.one_line(problem)}
        response = {"status_code": status, "body": {"error": error}}
        return {"id": job.id, "custom_id": job.custom_id, "response": response, "error": error}
    assert answer is not None, "a job without a problem has an answer"
    text = {"message": {"role": "assistant", "content": answer.text}} if job.chat else {"text": answer.text}
    generated = len(answer.token_ids)
    body = {
        "id": ("chatcmpl-" if job.chat else "cmpl-") + job.id.removeprefix(_ID),
        "object": "chat.completion" if job.chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **text, "finish_reason": answer.finish_reason}],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": answer.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        },
    }
    response = {"status_code": 200, "body": body}
    return {"id": job.id, "custom_id": job.custom_id, "response": response, "error": None}


def _add(summary: Summary, line: Mapping[str, Any]) -> None:
    if line["error"] is not None:
        summary.failed += 1
        return
    usage = line["response"]["body"]["usage"]
    summary.completed += 1
    summary.prompt_tokens += usage["prompt_tokens"]
    summary.generation_tokens += usage["completion_tokens"]
    summary.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
