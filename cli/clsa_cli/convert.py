"""`clsa convert`: a checkpoint written anew: quantised, dequantised, or in another dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from clsa_cli import options, output

_SIZES = (32, 64, 128)


def _one_of(*allowed: int) -> Callable[[int | None], int | None]:
    def check(value: int | None) -> int | None:
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"must be {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}, got {value}")
        return value

    return check


def _on_the_host(value: str) -> str:
    if value not in ("auto", "numpy"):
        raise typer.BadParameter(f"a conversion runs on the host, with auto or numpy, got {value!r}")
    return value


def convert(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not hold a checkpoint yet.")],
    quantize: Annotated[
        int | None,
        typer.Option(help="Bits per weight, 4 or 8; left out, weights are floating point.", callback=_one_of(4, 8)),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 32, 64 or 128.  [default: 64]", callback=_one_of(*_SIZES)),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; left out, the model's own.", callback=options.check_dtype),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto or numpy: it runs on the host.", callback=_on_the_host)] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Quantise a model to 4 or 8 bits as mlx-lm does, or write it in another dtype; tokenizer files go with it.

    Quantised are the matrices whose rows are a multiple of the group size, the embedding too. Norms and other matrices
    stay floating point. Without --quantize a quantised model becomes an ordinary one again.
    """
    from clsa.config import Quantization
    from clsa.convert import convert as write
    from clsa.hub import resolve
    from clsa.params import num_parameters

    if group_size is not None and quantize is None:
        raise typer.BadParameter("--group-size belongs to --quantize 4 or --quantize 8")
    how = None if quantize is None else Quantization(group_size=group_size or 64, bits=quantize)
    made = write(resolve(model), out, quantization=how, dtype=dtype, report=output.note)
    parameters = num_parameters(made.config)
    facts = {
        "folder": str(out),
        "parameters": parameters,
        "weight_bytes": made.num_bytes,
        "bits_per_parameter": round(8 * made.num_bytes / parameters, 3),
        "dtype": made.config.torch_dtype,
        "quantization": made.config.to_dict().get("quantization"),
    }
    if json:
        output.write_json(facts)
    else:
        output.facts([("folder", str(out)), ("weights", output.weights(made.config, made.num_bytes))])
