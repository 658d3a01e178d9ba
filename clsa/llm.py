"""What a user imports: load a model, generate, stream, chat, look inside."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clsa.backend import load_backend
from clsa.checkpoint import Checkpoint, open_checkpoint
from clsa.config import DTYPES, EngineConfig, ModelConfig, SamplingParams
from clsa.engine import Engine
from clsa.errors import ConfigError, RequestError
from clsa.hub import resolve
from clsa.inspect_model import evaluate_logits, evaluate_selection
from clsa.ops import Ops
from clsa.outputs import Delta, Piece, PieceClock, RequestOutput, collect, drain
from clsa.params import nest, num_parameters
from clsa.plan import make_plan
from clsa.request import Request
from clsa.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[int]
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
        _check_weights_fit(ops, checkpoint.config, dtype)
        self._params = nest({name: ops.asarray(array, dtype) for name, array in checkpoint.tensors()})
        self._engine = Engine(ops, self._params, self._plan, tokenizer, dtype, engine)
        self._conversation: tuple[str, list[int]] = ("", [])

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, batched; outputs are in the order of the prompts.

        Args: a prompt is text or token ids; `params` is one for all or one each (default: greedy, 256 tokens).
        Raises RequestError, before anything runs, if one of the prompts can never be answered.
        """
        batch: list[Prompt] = [prompts] if _is_one_prompt(prompts) else list(prompts)  # type: ignore[list-item,arg-type]
        each = _params_for(batch, params)
        requests = [self._engine.make_request(self._encode(prompt), p) for prompt, p in zip(batch, each, strict=True)]
        deltas: dict[str, list[Delta]] = {request.id: [] for request in requests}
        left = deque(requests)
        try:
            while left or self._engine.has_work:
                while left and self._engine.has_room:
                    self._engine.add(left.popleft())
                for delta in self._engine.step():
                    deltas[delta.request.id].append(delta)
        except BaseException:
            self._engine.cancel(requests)
            raise
        return [collect(request, deltas[request.id]) for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Answer one prompt piece by piece. Closing the iterator cancels the request and frees its state."""
        return self._pieces(self._engine.make_request(self._encode(prompt), _streamed(params)))

    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, stream: bool = False
    ) -> RequestOutput | Iterator[Piece]:
        """Answer the last message of a conversation ({"role", "content"} each), by the model's chat template.

        The state of earlier turns is found again in the prefix cache; only what is new is computed.
        """
        text = self.tokenizer.apply_chat_template(messages)
        ids = self._continue(text)
        request = self._engine.make_request(ids, _streamed(params))
        pieces = self._remember(text, ids, self._pieces(request))
        return pieces if stream else drain(pieces)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits of every position, float32 [T, vocab], with the selection applied per position."""
        return evaluate_logits(self._ops, self._params, self._plan, self.dtype, self._check_ids(token_ids))

    def selection(self, token_ids: Sequence[int], layer: int | None = None) -> np.ndarray:
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
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; give some text or token ids")
            return self.tokenizer.encode(prompt)
        return self._check_ids(prompt)

    def _check_ids(self, token_ids: Sequence[int]) -> list[int]:
        ids = [int(t) if isinstance(t, (int, np.integer)) and not isinstance(t, bool) else -1 for t in token_ids]
        if not ids:
            raise RequestError("the prompt is empty; give some text or token ids")
        bad = next((i for i, t in enumerate(ids) if not 0 <= t < self.config.vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"token {bad} of the prompt must be an id from 0 to {self.config.vocab_size - 1}, "
                f"got {token_ids[bad]!r}"
            )
        return ids

    def _pieces(self, request: Request) -> Iterator[Piece]:
        self._engine.add(request)
        clock = PieceClock(request)
        try:
            while self._engine.has_work:
                for delta in self._engine.step():
                    if delta.request is request:
                        yield clock.piece(delta, self._ops.memory_stats()["peak"])
        finally:
            self._engine.cancel([request])

    def _continue(self, text: str) -> list[int]:
        """Token ids of a conversation: what was generated before is kept as generated, not tokenised anew."""
        before, ids = self._conversation
        if before and text.startswith(before):
            rest = text[len(before) :]
            return ids + (self.tokenizer.encode(rest, add_special_tokens=False) if rest else [])
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _remember(self, text: str, ids: list[int], pieces: Iterator[Piece]) -> Iterator[Piece]:
        answer: list[str] = []
        tokens: list[int] = []
        for piece in pieces:
            answer.append(piece.text)
            tokens.append(piece.token)
            # A stop token or stop string is in the tokens and not in the text: that turn is tokenised anew.
            whole = piece.finish_reason == "length" or piece.finish_reason is None
            self._conversation = (text + "".join(answer), ids + tokens) if whole else ("", [])
            yield piece


def _is_one_prompt(prompts: Any) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))


def _params_for(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(f"params must be one SamplingParams or one per prompt ({len(prompts)}), got {len(params)}")
    return list(params)


def _streamed(params: SamplingParams | None) -> SamplingParams:
    """A stream shows the log-probability of each token, so it always asks for it."""
    params = params or SamplingParams()
    return params if params.logprobs is not None else replace(params, logprobs=0)


def _check_weights_fit(ops: Ops, config: ModelConfig, dtype: str) -> None:
    needed, free = num_parameters(config) * ops.itemsize(dtype), ops.memory_stats()["free"]
    if needed > free:
        raise ConfigError(
            f"the weights need {needed:,} bytes in {dtype} and {free:,} are free on {ops.device}; "
            "use a shorter dtype or a larger device"
        )
