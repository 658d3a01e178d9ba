"""The text that MLX hands to Apple's compiler for a custom kernel, built by MLX's own rules.

`tests/metal/test_signature.py` holds it against what MLX itself writes, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

TemplateValue = bool | int | np.dtype
Template = Sequence[tuple[str, TemplateValue]]

# Inputs with fewer elements than this live in Metal's constant address space.
MIN_DEVICE_SIZE = 8

TYPE_NAMES: dict[np.dtype, str] = {
    np.dtype(np.bool_): "bool",
    np.dtype(np.float32): "float",
    np.dtype(np.float16): "float16_t",
    np.dtype(ml_dtypes.bfloat16): "bfloat16_t",
    np.dtype(np.complex64): "complex64_t",
    **{np.dtype(f"{kind}{bits}"): f"{kind}{bits}_t" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}

# In this order MLX appends them, each if its name occurs anywhere in the body.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}


@dataclass(frozen=True)
class Kernel:
    """A custom kernel: the arguments of `mx.fast.metal_kernel`."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False


@dataclass(frozen=True)
class Parameter:
    """A buffer parameter of the generated function: its C++ type, its name, and where its bytes come from."""

    type: str  # as MLX writes it, with address space, "*" or "&"
    name: str
    origin: str  # "input", "shape", "strides", "ndim" or "output"
    index: int  # of the input or output


@dataclass(frozen=True)
class Source:
    """The generated text in its parts."""

    kernel: Kernel
    function: str
    parameters: list[Parameter]
    attributes: list[str]
    template: list[tuple[str, TemplateValue]]

    @property
    def template_line(self) -> str:
        """`template <typename T, int D>` and a newline, or nothing."""
        if not self.template:
            return ""
        return f"template <{', '.join(f'{_kind(value)} {name}' for name, value in self.template)}>\n"

    @property
    def instance(self) -> str:
        """The function with its template values: `custom_kernel_f_float_4<float, 4>`."""
        return self.function + template_arguments(self.template)

    @property
    def text(self) -> str:
        """What MLX compiles after its preamble."""
        declarations = [f"  {p.type} {p.name} [[buffer({i})]]" for i, p in enumerate(self.parameters)]
        outputs = len(self.kernel.output_names)
        inputs = len(self.kernel.input_names)
        parts = [self.kernel.header, self.template_line, f"[[kernel]] void {self.function}(\n"]
        for slot, declaration in enumerate(declarations):
            # MLX closes the list by counting names, so shapes without attributes give a broken signature. So here.
            is_output = slot >= len(declarations) - outputs
            closes = is_output and slot >= inputs + outputs - 1 and not self.attributes
            parts.append(declaration + (") {\n" if closes else ",\n"))
        attributes = [f"  {ATTRIBUTES[name]} {name} [[{name}]]" for name in self.attributes]
        if attributes:
            parts.append(",\n".join(attributes) + ") {\n")
        parts += [self.kernel.source, "\n}\n"]
        if self.template:
            host_name = f'[[host_name("{self.function}")]]'
            parts.append(f"\ntemplate {host_name} [[kernel]] decltype({self.instance}) {self.instance};\n")
        return "".join(parts)


def generate(
    kernel: Kernel, inputs: Sequence[np.ndarray], output_dtypes: Sequence[np.dtype], template: Template = ()
) -> Source:
    """Apply MLX's rules to a kernel and the arrays it is called with."""
    name = f"custom_kernel_{kernel.name}"
    if template:
        name += "_" + template_arguments(template).replace(", ", "_").replace("<", "_").replace(">", "")
    for array in inputs:
        name += f"_{TYPE_NAMES[array.dtype]}" + ("s" if array.ndim == 0 else "c" if _is_constant(array) else "")
    for dtype in output_dtypes:
        name += f"_{TYPE_NAMES[dtype]}"
    return Source(
        kernel=kernel,
        function=name,
        parameters=_parameters(kernel, inputs, output_dtypes),
        attributes=[attribute for attribute in ATTRIBUTES if attribute in kernel.source],
        template=list(template),
    )


def _parameters(kernel: Kernel, inputs: Sequence[np.ndarray], output_dtypes: Sequence[np.dtype]) -> list[Parameter]:
    found = []
    for i, (name, array) in enumerate(zip(kernel.input_names, inputs)):
        space = "constant" if _is_constant(array) else "device"
        reference = "&" if array.ndim == 0 else "*"
        found.append(Parameter(f"const {space} {TYPE_NAMES[array.dtype]}{reference}", name, "input", i))
        for origin, type_ in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
            if array.ndim > 0 and f"{name}_{origin}" in kernel.source:
                found.append(Parameter(f"const constant {type_}", f"{name}_{origin}", origin, i))
    for i, (name, dtype) in enumerate(zip(kernel.output_names, output_dtypes)):
        element = f"atomic<{TYPE_NAMES[dtype]}>" if kernel.atomic_outputs else TYPE_NAMES[dtype]
        found.append(Parameter(f"device {element}*", name, "output", i))
    return found


def template_arguments(template: Template) -> str:
    """`<float, 4, 1>`, or nothing."""
    return f"<{', '.join(_value(value) for _, value in template)}>" if template else ""


def _value(value: TemplateValue) -> str:
    # MLX prints a bool as 1 or 0.
    return TYPE_NAMES[value] if isinstance(value, np.dtype) else str(int(value))


def _kind(value: TemplateValue) -> str:
    if isinstance(value, np.dtype):
        return "typename"
    return "bool" if isinstance(value, bool) else "int"


def _is_constant(array: np.ndarray) -> bool:
    return array.size < MIN_DEVICE_SIZE
