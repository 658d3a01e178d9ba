"""What callers hand in: prompts, parameters and conversations, checked and turned into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clsa.config import SamplingParams, show
from clsa.errors import RequestError
from clsa.outputs import Delta
from clsa.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray
Messages = Sequence[Mapping[str, str]]


class Turn:
    """One turn of a conversation: the text and ids of what was asked, and the answer as it was generated."""

    def __init__(self, text: str, prompt: list[int]) -> None:
        self.prompt = prompt
        self._text = text
        self._answer: list[str] = []
        self._tokens: list[int] = []

    def add(self, delta: Delta) -> None:
        self._answer.append(delta.text)
        if delta.token is not None and delta.finish_reason != "stop":  # what stops an answer is not in its text
            self._tokens.append(delta.token)

    def encode_next(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of `text`: where it goes on from this turn, what that turn had is not tokenised anew."""
        answer = "".join(self._answer)
        known = [(self._text, self.prompt)]
        if tokenizer.decode(self._tokens) == answer:  # not where text was held back or cut by a stop string
            known.insert(0, (self._text + answer, self.prompt + self._tokens))
        before, ids = next((pair for pair in known if text.startswith(pair[0])), ("", []))
        rest = text[len(before) :]
        return ids + (tokenizer.encode(rest, add_special_tokens=False) if rest else [])


def encode(prompt: Prompt, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The ids of a prompt. Raises RequestError if it is empty or no prompt."""
    return tokenizer.encode(prompt) if isinstance(prompt, str) and prompt else check_ids(prompt, vocab_size)


def check_ids(token_ids: Any, vocab_size: int) -> list[int]:
    """`token_ids` as a list. Raises RequestError if they are not one or more ids of the vocabulary."""
    if not _is_list(token_ids) and token_ids != "":
        raise RequestError(f"a prompt must be text or a list of token ids, got {show(token_ids)}")
    if not len(token_ids):
        raise RequestError("the prompt is empty; give some text or token ids")
    for i, token in enumerate(token_ids):
        is_int = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
        if not is_int or not 0 <= int(token) < vocab_size:
            raise RequestError(f"token {i} of the prompt must be an id from 0 to {vocab_size - 1}, got {show(token)}")
    return [int(token) for token in token_ids]


def as_batch(prompts: Any) -> list[Prompt]:
    """The prompts as a list, also if it is only one. Raises RequestError if they are none."""
    if isinstance(prompts, str) or (_is_list(prompts) and len(prompts) and isinstance(prompts[0], (int, np.integer))):
        return [prompts]
    if not _is_list(prompts):
        raise RequestError(f"prompts must be a text, token ids, or a list of those, got {show(prompts)}")
    return list(prompts)


def check_params(params: Any) -> SamplingParams:
    """Parameters of one prompt, the default if it is None. Raises RequestError if they are something else."""
    return params_for([""], params)[0]


def params_for(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """One SamplingParams for each prompt. Raises RequestError if `params` are neither one nor as many."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if not _is_list(params) or len(params) != len(prompts) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(f"params must be one SamplingParams or one per prompt ({len(prompts)}), got {show(params)}")
    return list(params)


def streamed(params: Any) -> SamplingParams:
    """A stream shows the log-probability of each token, so it always asks for it."""
    checked = check_params(params)
    return checked if checked.logprobs is not None else replace(checked, logprobs=0)


def _is_list(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
