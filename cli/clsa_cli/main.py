"""`clsa`: the commands, and the one place that turns errors into a sentence and an exit code.

Exit codes: 0, 1 for a failure, 2 for bad usage, 130 after Ctrl-C. The modules of the commands import nothing
heavy before they run, so that `clsa --help` is quick and works whatever is installed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from clsa import ClsaError, RequestError, __version__
from clsa_cli import output
from clsa_cli.bench import bench
from clsa_cli.chat import chat
from clsa_cli.convert import convert
from clsa_cli.eval import eval_
from clsa_cli.generate import generate
from clsa_cli.info import info
from clsa_cli.train import train

# typer carries a copy of click, or needs click itself, depending on its version; this is the base either way.
_UsageProblem: Any = typer.BadParameter.__mro__[2]
_EXTRAS = {"torch": "train", "mlx": "mlx"}


class _Group(TyperGroup):
    """A command group whose errors are one sentence on stderr, also when it is called from a test."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if reconfigure := getattr(stream, "reconfigure", None):
                reconfigure(errors="backslashreplace")  # a terminal that lacks a letter must not end the answer
        # tokenizers would warn on stderr about its threads whenever anything forks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except _UsageProblem as problem:
            output.error(problem.format_message() + _hint(problem))
            code = problem.exit_code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        with _sentences():
            return super().invoke(ctx)


def _hint(problem: Any) -> str:
    path = getattr(problem.ctx, "command_path", "clsa")
    return f"{'' if problem.format_message().endswith('.') else '.'} See `{path} --help`."


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    try:
        yield
    except (typer.Exit, _UsageProblem):
        raise
    except BrokenPipeError:  # the reader has seen enough; Python must not complain at exit that it cannot flush
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        if os.environ.get("CLSA_DEBUG") == "1" and not isinstance(error, ClsaError):
            raise
        output.error(_sentence(error))
        raise typer.Exit(2 if isinstance(error, RequestError) else 1) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, ClsaError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        extra = _EXTRAS[error.name]
        return f'this needs {error.name}, which is not installed: pip install "clsa[{extra}]"'
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {error} (CLSA_DEBUG=1 shows where; please report it)"


def _version(wanted: bool) -> None:
    if wanted:
        output.write(f"clsa {__version__}\n")
        raise typer.Exit


app = typer.Typer(cls=_Group, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Cross-Layer Sparse Attention: run, chat with, train and measure models with one shared memory and index."""
    if ctx.invoked_subcommand is None:
        if text := ctx.get_help():  # empty where rich has printed it already
            output.write(text + "\n")
        raise typer.Exit(2)


app.command("generate")(generate)
app.command("chat")(chat)
app.command("train")(train)
app.command("eval")(eval_)
app.command("convert")(convert)
app.command("info")(info)
app.add_typer(bench, name="bench")


def main() -> None:
    """The console script."""
    app(prog_name="clsa")
