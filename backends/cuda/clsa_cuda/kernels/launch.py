"""A short way to a launch, for steps that are not recorded: Triton's own takes 25 us of the host, of which most is
finding out each time which compiled kernel these arguments want.

    @launcher
    @triton.jit
    def kernel(...)

is launched as before. The first launch of its kind goes through Triton; later ones go straight to what was compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def kind(x: Any) -> Any:
    """What of an argument decides which kernel is compiled: all that Triton looks at, and at most more than that."""
    if isinstance(x, Tensor):
        return x.dtype if x.data_ptr() % 16 == 0 else (x.dtype, "unaligned")
    if type(x) is int:
        if not -(1 << 31) <= x < 1 << 31:
            return ("long", x % 16 == 0)
        return "one" if x == 1 else "times 16" if x % 16 == 0 else "int"
    return float if type(x) is float else (type(x), x)


class Launcher:
    """A kernel, and what was compiled of it for which kinds of arguments."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        # names of the constants -> device, kinds and constants -> the compiled kernel, and its arguments behind those
        self._known: dict[tuple[str, ...], dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        device = driver.active.get_current_device()
        key = (device, *map(kind, args), *constants.values())
        known = self._known.setdefault(tuple(constants), {})
        found = known.get(key)
        if found is None or knobs.runtime.launch_enter_hook.calls or self.kernel.pre_run_hooks:
            compiled = self.kernel[grid](*args, **constants)
            known[key] = compiled, tuple(constants[name] for name in self.kernel.arg_names[len(args) :])
            return
        compiled, rest = found
        rows, columns = grid if len(grid) == 2 else (*grid, 1)
        stream = driver.active.get_current_stream(device)
        compiled.run(
            rows, columns, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *rest
        )


def launcher(kernel: Any) -> Any:
    """See the top. A kernel stays as it is in Triton's interpreter, and where a later Triton may launch otherwise."""
    return Launcher(kernel) if isinstance(kernel, JITFunction) and triton.__version__.startswith("3.6.") else kernel


def jit_function(kernel: Any) -> Any:
    """What Triton made of a kernel, for those who compile it themselves."""
    return kernel.kernel if isinstance(kernel, Launcher) else kernel
