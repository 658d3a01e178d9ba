"""One line of a batch: a request in the OpenAI batch form becomes a job, an answer becomes a result.

A request is `{"custom_id", "method", "url", "body"}`, a result `{"id", "custom_id", "response", "error"}`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from clsa import ClsaError, RequestError
from clsa.config import SamplingParams, show
from clsa_cli import output

if TYPE_CHECKING:
    from clsa.outputs import RequestOutput
    from clsa.tokenizer import Tokenizer

MAX_ID = 512
ID_PREFIX = "batch_req_"
DUPLICATE = "duplicate_custom_id"
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_PARAMS = {
    name: name
    for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "stop")
} | {"stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos", "max_completion_tokens": "max_tokens"}
# Keys that clients always send: accepted with the value that asks for nothing.
_NEUTRAL = {"n": 1, "best_of": 1, "stream": False, "echo": False, "logprobs": False, "top_logprobs": 0}
_NEUTRAL |= {"frequency_penalty": 0, "presence_penalty": 0}
_NOT_OURS = {"model", "user", "metadata"}


@dataclass(frozen=True, slots=True)
class Job:
    """One line: ready to run, or with the reason why not in place of the prompt."""

    id: str
    custom_id: str | None
    prompt: str | list[int] | RequestError = ""
    params: SamplingParams = field(default_factory=SamplingParams)
    chat: bool = False
    twice: bool = False  # another line has this custom_id


@dataclass(slots=True)
class Summary:
    """What a run did; `skipped` lines had a result already."""

    completed: int = 0
    failed: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0

    def add(self, result: Mapping[str, Any]) -> None:
        if result["error"] is not None:
            self.failed += 1
            return
        usage = result["response"]["body"]["usage"]
        self.completed += 1
        self.prompt_tokens += usage["prompt_tokens"]
        self.generation_tokens += usage["completion_tokens"]
        self.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]


def read_job(number: int, line: bytes, tokenizer: Tokenizer, defaults: SamplingParams) -> Job:
    """The job of line `number`; what is wrong with it is in the job."""
    from clsa.files import parse_json

    job = Job(f"{ID_PREFIX}{number}", None)
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
        return replace(job, prompt=RequestError(str(error)))


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


def result_of(job: Job, answer: RequestOutput | RequestError, model: str) -> dict[str, Any]:
    """The result line of a job."""
    if isinstance(answer, RequestError):
        return _error(job, 400, DUPLICATE if job.twice else "invalid_request", str(answer))
    if answer.error is not None:
        return _error(job, 500, "server_error", answer.error)
    text = {"message": {"role": "assistant", "content": answer.text}} if job.chat else {"text": answer.text}
    generated = len(answer.token_ids)
    body = {
        "id": ("chatcmpl-" if job.chat else "cmpl-") + job.id.removeprefix(ID_PREFIX),
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


def _error(job: Job, status: int, code: str, problem: str) -> dict[str, Any]:
    error = {"code": code, "message": output.one_line(problem)}
    response = {"status_code": status, "body": {"error": error}}
    return {"id": job.id, "custom_id": job.custom_id, "response": response, "error": error}
