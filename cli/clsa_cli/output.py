"""What goes where: results to stdout exactly as they are, everything else to stderr.

Text of a model or a user is never read as markup. Errors and notes are one line, with control characters escaped.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from clsa import ModelConfig

MAX_LINE = 2000
# For `str.translate`. A terminal obeys control characters, whoever wrote them: there they are shown as symbols instead.
CONTROL_SYMBOLS = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)


def write(text: str) -> None:
    """Put text on stdout at once: unchanged, except that a terminal gets symbols for control characters."""
    sys.stdout.write(text.translate(CONTROL_SYMBOLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: Mapping[str, Any]) -> None:
    """Put one JSON object on a line of stdout; numbers that JSON has no word for become null."""
    write(json_line(value))


def json_line(value: Mapping[str, Any]) -> str:
    """One JSON object and a line end, in ASCII, so that no encoding of the receiver can harm it."""
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def note(text: str) -> None:
    """A dim line on stderr."""
    typer.echo(typer.style(one_line(text), dim=True), err=True)


def error(text: str) -> None:
    """`error: ...` on stderr, as one line."""
    typer.echo(f"{typer.style('error:', fg='red')} {one_line(text)}", err=True)


def one_line(text: str) -> str:
    """The same words on one line of bounded length, with what cannot be printed written as escapes."""
    line = " ".join(text.split())
    if len(line) > MAX_LINE:
        line = line[:MAX_LINE] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def console(*, stderr: bool = False) -> Console:
    """A rich console that takes strings literally and does not fold lines into a pipe."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = 200
    return made


def facts(rows: Iterable[tuple[str, str]], *, stderr: bool = False) -> None:
    """Print lines of a dim name and a value."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, one_line(value))
    console(stderr=stderr).print(table)


def count(number: int, word: str) -> str:
    """`1 token`, `2,048 tokens`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def size(num_bytes: int) -> str:
    """Bytes as a person reads them: `980 bytes`, `12.3 MB`."""
    if num_bytes < 1000:
        return count(num_bytes, "byte")
    value, units = float(num_bytes), ("kB", "MB", "GB", "TB")
    for unit in units:
        value /= 1000
        if value < 999.95 or unit == units[-1]:
            break
    return f"{value:,.1f} {unit}"


def weights(config: ModelConfig, num_bytes: int) -> str:
    """What weights are stored as: `12.3 MB, bfloat16`, `3.9 MB, 4 bits in groups of 64, ...`."""
    from clsa.params import num_parameters

    how, dtype = config.quantization, config.torch_dtype
    if how is None:
        return f"{size(num_bytes)}, {dtype}"
    mean = 8 * num_bytes / num_parameters(config)
    return (
        f"{size(num_bytes)}, {how.bits} bits in groups of {how.group_size}, the rest {dtype}; "
        f"{mean:.2f} bits per parameter"
    )


def echo_prompt(text: str) -> None:
    """The end of the prompt, dim on stderr, so that the answer on stdout reads on from it."""
    shown = text if len(text) <= MAX_LINE else "..." + text[-MAX_LINE:]
    typer.echo(typer.style(shown.translate(CONTROL_SYMBOLS), dim=True), nl=False, err=True)
