"""`clsa chat`: a conversation. Each turn pays only for what is new: the prefix cache keeps the rest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clsa import ClsaError
from clsa.config import EngineConfig
from clsa_cli import options, output
from clsa_cli.chat_documents import as_text, check_room, leading_tokens, names, process, read_documents
from clsa_cli.chat_input import piped_line, terminal_lines
from clsa_cli.chat_session import COMMANDS, WITH_FILE, Conversation
from clsa_cli.chat_store import DocumentStore, cache_folder
from clsa_cli.generate import check_text

if TYPE_CHECKING:
    from clsa.llm import LLM

_DOCUMENTS, _SHOW = "Documents", "Output"
CACHE_BYTES = 10_000_000_000


def chat(
    model: options.Model = "demo",
    system: Annotated[str | None, typer.Option(help="What the model is told before the first message.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text to talk about; may be given more than once. It is processed once and then kept.",
            rich_help_panel=_DOCUMENTS,
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where processed documents are kept; left out, in the user's folder for caches.",
            file_okay=False,
            rich_help_panel=_DOCUMENTS,
        ),
    ] = None,
    cache_bytes: Annotated[
        int,
        typer.Option(
            help="What all kept documents may take; those not used for longest go first. 0 keeps none.",
            min=0,
            max=1 << 50,
            rich_help_panel=_DOCUMENTS,
        ),
    ] = CACHE_BYTES,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Show answers as they are; left out, a terminal shows Markdown rendered.",
            rich_help_panel=_SHOW,
        ),
    ] = False,
    max_tokens: options.MaxTokens = 256,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    backend: options.Backend = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    max_memory: options.MaxTokensInMemory = None,
    kv_dtype: options.KvDtype = None,
    index_dtype: options.IndexDtype = None,
    weight_dtype: options.WeightDtype = None,
) -> None:
    """Talk with a model; /help lists the commands. A pipe works too: one message per line, answers on stdout."""
    params = options.sampling(
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop,
    )
    start = [] if system is None else [{"role": "system", "content": check_text(system)}]
    documents = read_documents(file or [])
    # One conversation, so the prefix cache may keep all the memory there is.
    engine = EngineConfig(
        max_num_seqs=1,
        max_tokens_in_memory=max_memory,
        prefix_cache_bytes=1 << 44,
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        weight_dtype=weight_dtype,
    )
    with options.opened(model, backend, device, dtype, engine) as llm:
        if not llm.tokenizer.has_chat_template:
            raise ClsaError(f"{model} has no chat template, so it cannot chat; use `clsa generate` instead")
        kept = None
        if documents:
            text, what = as_text(documents), names(documents)
            start = [{"role": "system", "content": f"{system}\n\n{text}" if system else text}]
            tokens = leading_tokens(llm, start, text)
            check_room(llm, len(tokens), what, max_tokens)
            kept = process(llm, tokens, what, _store(cache_dir, cache_bytes))
        plain = plain or _only_continues(llm)
        interactive = sys.stdin.isatty()
        lines = terminal_lines(COMMANDS, WITH_FILE) if interactive else piped_line
        Conversation(llm, params, start, kept=kept, plain=plain).run(lines, interactive=interactive)


def _only_continues(llm: LLM) -> bool:
    """Whether the template says nothing behind a message: such a model continues texts, and they are no Markdown."""
    message = "x"
    return llm.tokenizer.apply_chat_template([{"role": "user", "content": message}]).endswith(message)


def _store(folder: Path | None, max_bytes: int) -> DocumentStore | None:
    if not max_bytes:
        return None
    try:
        return DocumentStore(folder or cache_folder(), max_bytes)
    except RuntimeError as error:
        output.note(f"the processed document will not be kept: {error}; --cache-dir names a folder for it")
        return None
