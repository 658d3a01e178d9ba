"""`clsa generate`: one prompt in, text out; or a file of requests in, a file of results out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from clsa import RequestError
from clsa.config import EngineConfig, SamplingParams
from clsa_cli import options, output
from clsa_cli.batch import Batch
from clsa_cli.batch_line import Summary

if TYPE_CHECKING:
    from clsa.llm import LLM
    from clsa.outputs import Piece

MAX_PROMPT_BYTES = 1 << 26
_WORK, _SHOW = "Work", "Output"


def generate(
    model: options.Model = "demo",
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue; - reads it from stdin.", rich_help_panel=_WORK)
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="A batch instead: requests in the OpenAI batch form, a JSON object per line.",
            exists=True,
            dir_okay=False,
            rich_help_panel=_WORK,
        ),
    ] = None,
    output_: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Where results of --input are appended; what it already holds is not run again.",
            dir_okay=False,
            rich_help_panel=_WORK,
        ),
    ] = None,
    load_cache: Annotated[
        Path | None,
        typer.Option(
            help="Start with the state of a prompt that --save-cache wrote; what begins alike is not computed again.",
            exists=True,
            dir_okay=False,
            rich_help_panel=_WORK,
        ),
    ] = None,
    save_cache: Annotated[
        Path | None,
        typer.Option(
            help="Then keep the state of the prompt in this safetensors file.", dir_okay=False, rich_help_panel=_WORK
        ),
    ] = None,
    salt: Annotated[
        str,
        typer.Option(
            help="Whose state this is: only prompts and cache files of the same salt share it.", rich_help_panel=_WORK
        ),
    ] = "",
    ordered: Annotated[
        bool,
        typer.Option("--ordered", help="Results of --input in the order of the requests.", rich_help_panel=_WORK),
    ] = False,
    max_tokens: options.MaxTokens = 256,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: each token's log-probability and this many best.", rich_help_panel=_SHOW),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.", rich_help_panel=_SHOW)
    ] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="Then say on stderr how fast it was and what it read.", rich_help_panel=_SHOW),
    ] = False,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print the text only when it is whole.", rich_help_panel=_SHOW)
    ] = False,
    backend: options.Backend = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_tokens_per_step: options.MaxTokensPerStep = None,
    max_memory: options.MaxTokensInMemory = None,
    kv_dtype: options.KvDtype = None,
    index_dtype: options.IndexDtype = None,
    weight_dtype: options.WeightDtype = None,
) -> None:
    """Continue a text, or run a batch of requests from a file."""
    params = options.sampling(
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop,
        logprobs=logprobs,
    )
    if logprobs is not None and (not json or input is not None):
        raise RequestError("--logprobs needs --json and --prompt")
    if max_num_seqs is not None and input is None:
        raise RequestError("--max-num-seqs needs --input; a prompt is answered alone")
    engine = EngineConfig(
        max_num_seqs=max_num_seqs if prompt is None else 1,
        max_tokens_per_step=max_tokens_per_step,
        max_tokens_in_memory=max_memory,
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        weight_dtype=weight_dtype,
    )
    if input is not None or output_ is not None:
        if input is None or output_ is None or prompt is not None:
            raise RequestError("a batch takes --input and --output, and no --prompt")
        if save_cache is not None:
            raise RequestError("--save-cache needs --prompt; a batch may only --load-cache")
        batch = Batch(input, output_)
        with options.opened(model, backend, device, dtype, engine) as llm:
            _load_cache(llm, load_cache, salt)
            _show_batch(output_, batch.run(llm, model, params, ordered=ordered, salt=salt), json)
        return
    if ordered:
        raise RequestError("--ordered needs --input and --output")
    if save_cache is not None and not save_cache.absolute().parent.is_dir():
        raise RequestError(f"there is no folder {save_cache.absolute().parent} for --save-cache")
    if prompt is None:
        raise RequestError("give --prompt TEXT, --prompt - for stdin, or --input FILE --output FILE")
    text = check_text(read_stdin() if prompt == "-" else prompt)
    with options.opened(model, backend, device, dtype, engine) as llm:
        _load_cache(llm, load_cache, salt)
        if report and not json:
            output.echo_prompt(text)
        answer = _run(llm, text, params, salt, show=not json, stream=not no_stream)
        if save_cache is not None:
            saved = llm.save_cache(save_cache, text, salt=salt)
            output.note(f"{save_cache}: wrote the state of {output.count(saved, 'token')}")
        if json:
            output.write_json(answer | _setting(llm, model, params))
        if report:
            _report(llm, answer)


def _show_batch(results: Path, summary: Summary, json: bool) -> None:
    output.note(
        f"{results}: {output.count(summary.completed, 'answer')}, {output.count(summary.failed, 'error')}, "
        f"{summary.skipped:,} there before"
    )
    if json:
        output.write_json(asdict(summary))


def _load_cache(llm: LLM, path: Path | None, salt: str) -> None:
    if path is not None:
        output.note(f"{path}: read the state of {output.count(llm.load_cache(path, salt=salt), 'token')}")


def read_stdin() -> str:
    """All of stdin as UTF-8 text. Raises RequestError if it is something else or too much."""
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise RequestError(f"stdin is larger than {MAX_PROMPT_BYTES} bytes, the longest prompt; shorten it")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text: {error.reason} at byte {error.start}") from None


def check_text(text: str) -> str:
    """`text` if it is a prompt. Raises RequestError if it is empty or was not UTF-8."""
    if not text:
        raise RequestError("the prompt is empty; give at least one character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not UTF-8 text: bad character at {error.start}") from None
    return text


def _run(llm: LLM, prompt: str, params: SamplingParams, salt: str, *, show: bool, stream: bool) -> dict[str, Any]:
    parts: list[str] = []
    logprobs: list[dict[str, Any]] = []
    last: Piece | None = None
    try:
        with contextlib.closing(cast("Generator[Piece, None, None]", llm.stream(prompt, params, salt=salt))) as pieces:
            for last in pieces:
                parts.append(last.text)
                if params.logprobs is not None and last.token >= 0:
                    logprobs.append({"token": last.token, "logprob": last.logprob, "top": last.top})
                if show and stream:
                    output.write(last.text)
    except BaseException:
        if show and stream and parts:
            output.write("\n")
        raise
    text = "".join(parts)
    if show:
        output.write(("" if stream else text) + ("" if text.endswith("\n") else "\n"))
    assert last is not None, "a stream has a last piece"
    return {
        "text": text,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "cached_tokens": last.cached_tokens,
        "generation_tokens": last.generation_tokens,
        "prompt_tps": last.prompt_tps,
        "generation_tps": last.generation_tps,
        "peak_memory": last.peak_memory,
        **({} if params.logprobs is None else {"logprobs": logprobs}),
    }


def _setting(llm: LLM, model: str, params: SamplingParams) -> dict[str, Any]:
    return {
        "backend": llm.backend,
        "device": llm.device,
        "dtype": llm.dtype,
        "kv_dtype": llm.memory_dtypes.kv,
        "index_dtype": llm.memory_dtypes.index,
        "weight_dtype": llm.weight_dtype,
        "model": model,
        "seed": params.seed,
    }


def _report(llm: LLM, answer: dict[str, Any]) -> None:
    from clsa.params import state_bytes_per_token, transformer_bytes_per_token, window_bytes

    config = llm.config
    state = state_bytes_per_token(config, llm.dtype, llm.memory_dtypes)
    other = transformer_bytes_per_token(config, llm.dtype)
    prompt, cached = answer["prompt_tokens"], answer["cached_tokens"]
    rows = [
        ("backend", llm.why),
        ("prompt", f"{output.count(prompt, 'token')} ({cached:,} cached), {answer['prompt_tps']:,.1f} tokens/s"),
        (
            "generation",
            f"{output.count(answer['generation_tokens'], 'token')} ({answer['finish_reason']}), "
            f"{answer['generation_tps']:,.1f} tokens/s",
        ),
        ("state", f"{state:,} bytes per token; a Transformer of these sizes keeps {other:,}"),
        ("windows", f"{output.size(window_bytes(config, llm.dtype))} per sequence, however long it is"),
        ("reads", reads(config.index_topk_pattern, config.index_topk, prompt, answer["generation_tokens"])),
        ("peak memory", output.size(answer["peak_memory"])),
    ]
    output.facts(rows, stderr=True)


def reads(pattern: str, index_topk: int, prompt_tokens: int, generation_tokens: int) -> str:
    """How many tokens each step read in the layers that read a memory, out of how many it saw.

    The step that makes token j of the answer stands at position `prompt_tokens - 1 + j` and sees that many and one.
    """
    seen = range(prompt_tokens, prompt_tokens + generation_tokens)
    dense, sparse = pattern.count("D"), len(pattern) - pattern.count("D")
    if not seen or not pattern:
        return "no step read a memory"
    if not sparse:
        return f"every step read all it saw, at last {output.count(seen[-1], 'token')}, in {_layers(dense)}"
    read = [min(index_topk, n) for n in seen]
    text = (
        f"the last step read {read[-1]:,} of the {output.count(seen[-1], 'token')} it saw, in {_layers(sparse)}; "
        f"all steps {sum(read):,} of {sum(seen):,} ({sum(read) / sum(seen):.0%})"
    )
    return text + (f"; {_layers(dense)} read all" if dense else "")


def _layers(number: int) -> str:
    return output.count(number, "layer")
