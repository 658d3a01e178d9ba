"""The options that commands share, spelled once, and what they ask for: sampling parameters, an open model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from clsa.config import DTYPES, FP8, EngineConfig, SamplingParams
from clsa_cli import output

if TYPE_CHECKING:
    from clsa.llm import LLM

_WHAT, _HOW, _WHERE, _SMALL = "Model", "Sampling", "Machine", "8 bits"


def check_dtype(value: str | None) -> str | None:
    """For a `--dtype` of a command's own."""
    if value is not None and value not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, got {value!r}")
    return value


def _check_fp8(value: str | None) -> str | None:
    if value not in (None, FP8):
        raise typer.BadParameter(f"must be {FP8}, or left out for the model's dtype, got {value!r}")
    return value


Model = Annotated[
    str,
    typer.Option(help="A bundled name, a folder, or a hub id (org/name).", rich_help_panel=_WHAT),
]
Backend = Annotated[
    str,
    typer.Option(
        help="What computes: auto, cuda, mlx, numpy or another plug-in. auto takes NVIDIA, then Metal, then CPU.",
        rich_help_panel=_WHERE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="A device's name as `clsa info` lists it; the best one if left out.", rich_help_panel=_WHERE),
]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(DTYPES)}; left out, clsa chooses.", callback=check_dtype, rich_help_panel=_WHERE),
]
MaxTokensInMemory = Annotated[
    int | None,
    typer.Option(
        "--max-tokens-in-memory",
        help="Tokens of all prompts and answers together, cached ones too; left out, sized from the free memory.",
        rich_help_panel=_WHERE,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        help="Sequences that are answered together; left out, what the device works best with.", rich_help_panel=_WHERE
    ),
]
MaxTokensPerStep = Annotated[
    int | None,
    typer.Option(
        help="Tokens of prompts and answers that a step takes; left out, what the device works best with.",
        rich_help_panel=_WHERE,
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option(help="fp8: K and V of the memory, one byte a number.", callback=_check_fp8, rich_help_panel=_SMALL),
]
IndexDtype = Annotated[
    str | None,
    typer.Option(help="fp8: the index keys, one byte a number.", callback=_check_fp8, rich_help_panel=_SMALL),
]
WeightDtype = Annotated[
    str | None,
    typer.Option(
        help="fp8: the weights of the layers, one byte a number.", callback=_check_fp8, rich_help_panel=_SMALL
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Longest answer in tokens.", rich_help_panel=_HOW)]
Temp = Annotated[float, typer.Option(help="Temperature; 0 is greedy.", rich_help_panel=_HOW)]
TopP = Annotated[
    float, typer.Option(help="Keep the most likely tokens up to this total; 1 is off.", rich_help_panel=_HOW)
]
TopK = Annotated[int, typer.Option(help="Keep this many of the most likely tokens; 0 is off.", rich_help_panel=_HOW)]
MinP = Annotated[
    float,
    typer.Option(help="Keep tokens at least this likely relative to the best; 0 is off.", rich_help_panel=_HOW),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.", rich_help_panel=_HOW)]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1 makes tokens seen before less likely; 1 is off.", rich_help_panel=_HOW)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; may be given up to 16 times.", rich_help_panel=_HOW),
]


def sampling(
    *,
    max_tokens: int,
    temp: float,
    top_p: float,
    top_k: int,
    min_p: float,
    seed: int,
    repetition_penalty: float,
    stop: list[str] | None,
    logprobs: int | None = None,
) -> SamplingParams:
    """The parameters that the options ask for. Raises RequestError on values out of bounds."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )


@contextlib.contextmanager
def opened(
    model: str, backend: str, device: str | None, dtype: str | None, engine: EngineConfig | None = None
) -> Iterator[LLM]:
    """Load a model for the length of a block; where the choice was ours, say on stderr what computes and why."""
    import clsa

    with contextlib.closing(clsa.load(model, backend, device, dtype, engine=engine)) as llm:
        if backend == "auto":
            output.note(f"backend: {llm.why}")
        yield llm
