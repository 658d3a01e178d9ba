"""What a user imports: load a model, generate, stream, chat, look inside."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from clsa.backend import load_backend
from clsa.checkpoint import Checkpoint, open_checkpoint
from clsa.config import DTYPES, EngineConfig, ModelConfig, SamplingParams, show
from clsa.engine import Engine
from clsa.errors import ConfigError, RequestError
from clsa.hub import resolve
from clsa.inspect_model import evaluate_logits, evaluate_selection
from clsa.ops import Ops
from clsa.outputs import Delta, Piece, PieceClock, RequestOutput, collect
from clsa.params import nest
from clsa.plan import make_plan
from clsa.request import Request, State
from clsa.sizing import plan_sizes
from clsa.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[int] | np.ndarray
Messages = Sequence[Mapping[str, str]]


def load(
    model: str = "demo",
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    *,
    engine: EngineConfig | None = None,
    offline: bool = False,
) -> LLM:
    """Load a model: a bundled name, a folder, or a hub id ("org/name").

    Args:
        backend: "auto" (NVIDIA, then Metal, then CPU), "mlx", "cuda", "numpy", or any installed backend.
        device: as `clsa.backends()` lists it; None takes the backend's best.
        dtype: "float32", "bfloat16" or "float16" for weights and state; None takes the checkpoint's own on a
            GPU and float32 on a CPU, which computes nothing shorter faster.
        engine: sizes of the engine; see EngineConfig.
        offline: take hub models from the local cache only.

    Raises: CheckpointError, ConfigError or BackendError, before anything large is allocated.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    checkpoint = open_checkpoint(resolve(model, offline=offline))
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    ops, why = load_backend(backend, device)
    if dtype is None:
        dtype = "float32" if ops.device.startswith("cpu") else checkpoint.config.torch_dtype
    return LLM(ops, checkpoint, tokenizer, dtype, engine or EngineConfig(), why)


class LLM:
    """A loaded model with its engine. Not thread-safe; one caller at a time.

    Attributes: `config`, `tokenizer`, `backend` (name), `device` (words), `dtype`, `why` (how it was chosen).
    """

    def __init__(
        self,
        ops: Ops,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        dtype: str,
        engine: EngineConfig,
        why: str,
    ) -> None:
        self.config: ModelConfig = checkpoint.config
        self.tokenizer = tokenizer
        self.backend, self.device, self.dtype, self.why = ops.name, ops.device, dtype, why
        self._ops, self._plan = ops, make_plan(checkpoint.config)
        sizes = plan_sizes(ops, self._plan, dtype, engine)
        self._params = nest({name: ops.asarray(array, dtype) for name, array in checkpoint.tensors()})
        self._engine = Engine(ops, self._params, self._plan, tokenizer, dtype, engine, sizes)
        self._mail: dict[str, deque[Delta]] = {}
        self._turn = _Turn("", [])

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, batched; outputs are in the order of the prompts.

        Args: a prompt is text or token ids; `params` is one for all or one each (default: greedy, 256 tokens).
        Raises RequestError, before anything runs, if one of the prompts can never be answered. A request that fails
        later has `finish_reason` "error" and the reason in `error`.
        """
        batch = _as_batch(prompts)
        each = _params_for(batch, params)
        requests = [self._engine.make_request(self._encode(prompt), p) for prompt, p in zip(batch, each, strict=True)]
        mail = [self._mail.setdefault(request.id, deque()) for request in requests]
        queue, unfinished = deque(requests), deque(requests)
        try:
            while unfinished:
                while queue and self._engine.has_room:
                    self._engine.add(queue.popleft())
                self._step()
                while unfinished and unfinished[0].state is State.FINISHED:
                    unfinished.popleft()
        finally:
            self._close(requests)
        return [collect(request, list(deltas)) for request, deltas in zip(requests, mail, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Answer one prompt piece by piece. Closing the iterator cancels the request and frees its state.

        Raises RequestError if the prompt can never be answered; a request that fails later raises ClsaError from
        the iterator. Several streams and calls of `generate` may take turns.
        """
        return self._pieces(self._engine.make_request(self._encode(prompt), _streamed(params)), None)

    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, stream: bool = False
    ) -> RequestOutput | Iterator[Piece]:
        """Answer the last message of a conversation ({"role", "content"} each), by the model's chat template.

        The state of earlier turns is found again in the prefix cache; only what is new is computed. For that the
        answer of the turn before is kept as it was generated, and not tokenised anew.
        """
        text = self.tokenizer.apply_chat_template(messages)
        turn = _Turn(text, self._turn.encode_next(text, self.tokenizer))
        if stream:
            return self._pieces(self._engine.make_request(turn.prompt, _streamed(params)), turn)
        request = self._engine.make_request(turn.prompt, _params_for([""], params)[0])
        return collect(request, list(self._deltas(request, turn)))

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits of every position, float32 [T, vocab], with the selection applied per position."""
        return evaluate_logits(self._ops, self._params, self._plan, self.dtype, self._check_ids(token_ids))

    def selection(self, token_ids: Sequence[int] | np.ndarray, layer: int | None = None) -> np.ndarray:
        """What the shared index chose: int32 [T, index_topk], ascending positions, -1 padded.

        `layer` picks one of the layers that compute an index (default: the first). Raises RequestError if it
        computes none.
        """
        ids = self._check_ids(token_ids)
        return evaluate_selection(self._ops, self._params, self._plan, self.dtype, ids, layer)

    def stats(self) -> dict[str, int]:
        """Counters of the engine: running, waiting, pages_total, pages_free, prefix_tokens_hit, preemptions, ..."""
        return self._engine.stats()

    def close(self) -> None:
        """Let go of weights and state; the object must not be used again."""
        del self._engine, self._params

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) and prompt else self._check_ids(prompt)

    def _check_ids(self, token_ids: Any) -> list[int]:
        if not _is_list(token_ids) and token_ids != "":
            raise RequestError(f"a prompt must be text or a list of token ids, got {show(token_ids)}")
        if not len(token_ids):
            raise RequestError("the prompt is empty; give some text or token ids")
        for i, token in enumerate(token_ids):
            is_int = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
            if not is_int or not 0 <= int(token) < self.config.vocab_size:
                raise RequestError(
                    f"token {i} of the prompt must be an id from 0 to {self.config.vocab_size - 1}, got {show(token)}"
                )
        return [int(token) for token in token_ids]

    def _step(self) -> None:
        assert self._engine.has_work, "somebody waits for a request that the engine does not have"
        for delta in self._engine.step():
            if (mail := self._mail.get(delta.request.id)) is not None:
                mail.append(delta)

    def _deltas(self, request: Request, turn: _Turn | None) -> Generator[Delta]:
        """Run the engine until a request has ended. What its steps bring to others waits in their mail."""
        mail = self._mail.setdefault(request.id, deque())
        self._turn = turn or self._turn
        try:
            self._engine.add(request)
            has_ended = False
            while not has_ended:
                while not mail:
                    self._step()
                delta = mail.popleft()
                has_ended = delta.finish_reason is not None
                if turn is not None:
                    turn.add(delta)
                yield delta
        finally:
            self._close([request])

    def _pieces(self, request: Request, turn: _Turn | None) -> Iterator[Piece]:
        with closing(self._deltas(request, turn)) as deltas:
            clock = PieceClock(request)
            for delta in deltas:
                yield clock.piece(delta, self._ops.memory_stats()["peak"])

    def _close(self, requests: Sequence[Request]) -> None:
        self._engine.cancel(requests)
        for request in requests:
            self._mail.pop(request.id, None)


class _Turn:
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


def _is_list(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _as_batch(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str) or (_is_list(prompts) and len(prompts) and isinstance(prompts[0], (int, np.integer))):
        return [prompts]
    if not _is_list(prompts):
        raise RequestError(f"prompts must be a text, token ids, or a list of those, got {show(prompts)}")
    return list(prompts)


def _params_for(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if not _is_list(params) or len(params) != len(prompts) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(f"params must be one SamplingParams or one per prompt ({len(prompts)}), got {show(params)}")
    return list(params)


def _streamed(params: SamplingParams | None) -> SamplingParams:
    """A stream shows the log-probability of each token, so it always asks for it."""
    params = _params_for([""], params)[0]
    return params if params.logprobs is not None else replace(params, logprobs=0)
