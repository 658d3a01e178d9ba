"""Gluon without a GPU: a kernel runs as Python, and what is asynchronous happens as early, or as late, as it may.

A copy moves its data at once, or only at the barrier after the wait for it; a product reads its operands at once, or
only when it is waited for; what the kernel in front writes is NaN until that is waited for. So an order that nobody
asked for shows as wrong numbers. What no numbers show, such as a missing fence, raises `Race`. Only what `ring_product`
uses of Gluon is here.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import EllipsisType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction

from clsa_cuda.kernels.launch import jit_function

SHARED_MEMORY = 227 << 10  # bytes of a program on Hopper: what passes here fits there
FROM_THE_KERNEL_IN_FRONT = ("x", "residual")  # arguments
OF_TORCH = ("abs", "exp", "float32", "int32", "int64", "permute", "reshape", "sqrt", "zeros_like")
OF_PROGRAMS = ("allocate_shared_memory", "atomic_add", "inline_asm_elementwise", "store")
LAYOUTS = ("BlockedLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout", "SwizzledSharedLayout")

Span = tuple[int, int]  # of addresses
Copy = tuple[Span, Callable[[], Any]]  # what is written when the function is first called


class Race(Exception):
    """Nothing says that one access comes before the other."""


def meet(spans: set[Span], *others: Span) -> bool:
    return any(start < end and begin < stop for start, stop in spans for begin, end in others)


class Pointer:
    """Places in the memory that a tensor is a view of."""

    def __init__(self, memory: Tensor, offsets: Tensor) -> None:
        self.memory, self.offsets = memory, offsets
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        memory = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
        return cls(memory, torch.tensor(x.storage_offset()))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + torch.as_tensor(offset, dtype=torch.int64))

    def read(self, mask: Tensor | None, other: float) -> Tensor:
        offsets = self.offsets if mask is None else torch.where(mask, self.offsets, 0)
        values = self.memory[self._checked(offsets)]
        return values if mask is None else torch.where(mask, values, other)

    def write(self, value: Any, mask: Tensor | None) -> Tensor:
        """Where it was written."""
        chosen: Tensor | EllipsisType = ... if mask is None else mask.expand(self.offsets.shape)
        offsets = self._checked(self.offsets[chosen])
        self.memory[offsets] = torch.as_tensor(value, dtype=self.memory.dtype).expand(self.offsets.shape)[chosen]
        return offsets

    def _checked(self, offsets: Tensor) -> Tensor:
        if offsets.numel() and (int(offsets.min()) < 0 or int(offsets.max()) >= len(self.memory)):
            raise IndexError(f"offsets {int(offsets.min())} to {int(offsets.max())} of {len(self.memory)} elements")
        return offsets


class Shared:
    """A tensor in shared memory, or a part of one. NaN until something is written."""

    def __init__(self, program: Program, data: Tensor) -> None:
        self._program, self.data = program, data
        self.span = (data.data_ptr(), data.data_ptr() + data.nbytes)

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.data.shape[0], f"slot {int(i)} of {self.data.shape[0]}"
        return Shared(self._program, self.data[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self._program, self.data.narrow(0, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self._program, self.data.permute(*order))

    def load(self, layout: object) -> Tensor:
        self._program.read.add(self.span)
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.data.dtype and value.shape == self.data.shape
        self.data.copy_(value)
        self._program.unfenced.add(self.span)


@dataclass(eq=False)
class Sums:
    """An accumulator of the tensor cores, without numbers before its product."""

    value: Any
    operands: tuple[Shared, ...] = ()
    before: Any = None
    is_overlaid: bool = False

    def run(self) -> None:
        if self.value is None:
            a, b = self.operands
            self.value = self.before.value + a.data.float() @ b.data.float()


@dataclass(eq=False)
class Program:
    """What one program has under way."""

    gpu: FakeGluon
    number: int
    arrive: Callable[[], None]  # puts what the kernel in front writes where it belongs
    has_arrived: bool
    group: list[Copy] = field(default_factory=list)  # not committed yet
    groups: deque[list[Copy]] = field(default_factory=deque)
    awaited: list[Copy] = field(default_factory=list)  # by each thread for its own; the others' are there at a barrier
    products: deque[Sums] = field(default_factory=deque)
    unfenced: set[Span] = field(default_factory=set)  # written by threads, which tensor cores see behind a fence
    read: set[Span] = field(default_factory=set)  # since the last barrier: other threads may be reading it
    shared_bytes: int = 0

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
        data = torch.full(tuple(shape), torch.nan, dtype=dtype)
        self.shared_bytes += data.nbytes
        assert self.shared_bytes <= SHARED_MEMORY, f"{self.shared_bytes} bytes of shared memory"
        return Shared(self, data)

    def inline_asm_elementwise(self, text: str, *_: Any, is_pure: bool, **__: Any) -> None:
        assert not is_pure, "may be moved"
        if text.startswith("griddepcontrol.wait;"):
            self.arrive()
            self.has_arrived = True
        else:
            assert text.startswith("griddepcontrol.launch_dependents;")
            self._check_arrived("the next kernel goes")

    def copy(self, to: Shared, source: Pointer, mask: Tensor | None = None) -> None:
        assert to.data.dtype == source.memory.dtype and to.data.shape == source.offsets.shape
        itemsize = source.memory.itemsize
        places = source.memory.data_ptr() + source.offsets[..., :: 16 // itemsize] * itemsize
        assert not (places % 16).any(), "copies of 16 bytes that are not aligned"
        if meet(self.read, to.span) or any(
            to.span == span for group in (self.group, *self.groups) for span, _ in group
        ):
            raise Race("a copy to where other threads may be reading, or copying")
        run = functools.cache(lambda: to.data.copy_(source.read(mask, 0.0)))
        self.group.append((to.span, run))
        if not self.gpu.late_copies:
            run()

    def commit_group(self) -> None:
        self.groups.append(self.group)
        self.group = []

    def wait_group(self, num_outstanding: int) -> None:
        while len(self.groups) > num_outstanding:
            self.awaited += self.groups.popleft()
        self.unfenced |= {span for span, _ in self.awaited}

    def thread_barrier(self) -> None:
        for _, run in self.awaited:
            run()
        self.awaited = []
        self.read.clear()

    def multiply(self, a: Shared, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Sums:
        assert is_async and a.data.dtype == b.data.dtype
        if meet(self.unfenced, a.span, b.span):
            raise Race("a product of what threads wrote, without a fence between")
        before = Sums(torch.zeros(())) if not use_acc else acc if isinstance(acc, Sums) else Sums(acc)
        self.products.append(Sums(None, (a, b), before))
        if not self.gpu.late_products:
            self.products[-1].run()
        return self.products[-1]

    def wait_for_products(self, num_outstanding: int, deps: Sequence[Sums | Shared]) -> Any:
        kept = {dep.span for dep in deps if isinstance(dep, Shared)}
        while len(self.products) > num_outstanding:
            product = self.products.popleft()
            product.run()
            self.read |= {operand.span for operand in product.operands}
            if product.is_overlaid and not all(meet(kept, operand.span) for operand in product.operands):
                raise Race("the compiler's scratch memory may lie where a product reads: name the rings in deps")
        assert not any(product in deps for product in self.products), "still being multiplied"
        values = tuple(dep.value if isinstance(dep, Sums) else dep for dep in deps)
        return values[0] if len(values) == 1 else values

    def use_scratch(self, result: Tensor) -> Tensor:
        """Of the compiler's, to move values between threads. It lies over rings that nothing further on mentions."""
        for product in self.products:
            product.is_overlaid = True
        return result

    def store(self, to: Pointer, value: Any, mask: Tensor | None = None) -> None:
        self._check_arrived("a store")
        places = to.write(value, mask)
        authors = self.gpu.authors.setdefault(to.memory.data_ptr(), torch.full(to.memory.shape, -1))
        if not torch.isin(authors[places], torch.tensor([-1, self.number])).all():
            raise Race("two programs store to one place")
        authors[places] = self.number

    def atomic_add(self, to: Pointer, value: int, sem: str) -> Tensor:
        assert sem == "acq_rel"
        self._check_arrived("an addition")
        before = self.use_scratch(to.read(None, 0.0).clone())
        to.write(before + value, None)
        return before

    def end(self) -> None:
        self._check_arrived("the end")
        if self.products or self.awaited or self.group or any(self.groups):
            raise Race("a program ends before what it asked for")

    def _check_arrived(self, what: str) -> None:
        if not self.has_arrived:
            raise Race(f"{what} before the wait for the kernel in front")


class FakeGluon:
    """Runs a kernel by `self[grid](...)`. What is late, and the order of programs, may change between two launches."""

    def __init__(self, kernel: Callable[..., None]) -> None:
        self._kernel = kernel
        self.late_copies = self.late_products = False
        self.seed: int | None = None  # of the order; None: by their numbers
        self.num_warps = 0
        self.program: Any = None
        self.authors: dict[int, Tensor] = {}  # by memory: which program stored to a place, or -1

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid[0])

    def _launch(self, size: int, *args: Any, **options: Any) -> None:
        signature = inspect.signature(self._kernel)
        given = signature.bind(*args, **{name: options.pop(name) for name in signature.parameters if name in options})
        values = {name: Pointer.to(x) if isinstance(x, Tensor) else x for name, x in given.arguments.items()}
        fresh = (given.arguments[name] for name in FROM_THE_KERNEL_IN_FRONT)
        held = [(x, x.clone()) for x in fresh if x is not given.arguments["out"]]

        def arrive() -> None:
            for x, true in held:
                x.copy_(true)

        numbers = range(size) if self.seed is None else random.Random(self.seed).sample(range(size), size)
        is_early, self.num_warps = options.get("launch_pdl", False), options["num_warps"]
        self.authors.clear()
        try:
            for number in numbers:
                for x, _ in held if is_early else ():
                    x.fill_(torch.nan)
                self.program = Program(self, number, arrive, not is_early)
                self._kernel(**values)
                self.program.end()
        finally:
            arrive()

    def language(self) -> dict[str, Any]:
        """What a kernel finds in its module: `gl` and the rest."""

        def of_program(name: str) -> Callable[..., Any]:
            return lambda *args, **options: getattr(self.program, name)(*args, **options)

        gl = {name: getattr(torch, name) for name in OF_TORCH} | {name: of_program(name) for name in OF_PROGRAMS}
        gl |= dict.fromkeys(LAYOUTS, lambda *args, **options: None)
        gl |= {
            "float8e4nv": torch.float8_e4m3fn,
            "static_range": range,
            "num_warps": lambda: self.num_warps,
            "program_id": lambda axis: torch.tensor(self.program.number, dtype=torch.int32),
            "arange": lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
            "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            "load": lambda at, mask=None, other=torch.nan, cache_modifier="": at.read(mask, other),
            "cast": lambda x, dtype: torch.as_tensor(x, dtype=dtype),
            "where": lambda is_so, a, b: (a if is_so else b) if isinstance(is_so, bool) else torch.where(is_so, a, b),
            "minimum": min,
            "maximum": lambda x, y: x.clamp(min=y),
            "max": lambda x, axis: self.program.use_scratch(x.amax(axis)),
            "sum": lambda x, axis: self.program.use_scratch(x.sum(axis)),
            "split": lambda x: x.unbind(-1),
            "convert_layout": lambda x, layout, **trivial: x if trivial else self.program.use_scratch(x),
        }
        async_copy = {name: of_program(name) for name in ("commit_group", "wait_group")}
        return {
            "gl": SimpleNamespace(**gl),
            "async_copy": SimpleNamespace(**async_copy),
            "barrier": of_program("thread_barrier"),
            "copy_in": of_program("copy"),
            "fence_async_shared": lambda: self.program.unfenced.clear(),
            "warpgroup_mma_init": Sums,
            "warpgroup_mma": of_program("multiply"),
            "warpgroup_mma_wait": of_program("wait_for_products"),
        }


def _to(x: Tensor, convert: Callable[..., Tensor], *to: Any, bitcast: bool = False, **how: Any) -> Tensor:
    return x.view(*to) if bitcast else convert(x, *to, **how)


@contextmanager
def emulated(patch: pytest.MonkeyPatch, module: ModuleType, kernel: str) -> Iterator[FakeGluon]:
    """A module whose Gluon functions are Python, and its kernel launched by a `FakeGluon`."""
    known = {name: jit_function(value) for name, value in vars(module).items()}
    functions = {name: value.fn for name, value in known.items() if isinstance(value, GluonJITFunction)}
    gpu, threads = FakeGluon(functions.pop(kernel)), torch.get_num_threads()
    torch.set_num_threads(1)  # more are slower: the tiles are small
    with patch.context() as inside:
        for name, value in (functions | gpu.language() | {kernel: gpu}).items():
            inside.setattr(module, name, value)
        inside.setattr(Tensor, "to", functools.partialmethod(_to, Tensor.to))
        yield gpu
    torch.set_num_threads(threads)
