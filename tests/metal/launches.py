"""What the GPU is asked to do for one decode step of the 4B model at 128K tokens: kernels, and the bytes they move.

Run as: python -m tests.metal.launches

MLX's own graph of the step is counted, without a GPU and without computing anything: the step is traced as on Metal,
compiled as `mx.compile` does it (which makes one kernel of neighbouring elementwise functions), and every node counts
that is no view of another array. A sort or partition of long rows, which is several kernels, counts as one, so the
figure for plain MLX is a lower bound.

Bytes are an upper bound: every kernel reads its inputs and writes its outputs, elementwise functions one by one, except
that a gather reads what it returns, a scatter writes its rows (tests/mlx/test_record.py: in place), and attention to a
selection reads the selected rows.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from clsa.bench.floors import decode_bytes
from clsa.bench.sizes import plan_config
from clsa.config import PAGE_SIZE, ModelConfig, Quantization
from clsa.model import forward
from clsa.ops import Memory, QuantizedWeight, Queries, State, StepBatch, Weight, Window
from clsa.params import nest, tensor_shapes
from clsa.plan import make_plan
from clsa_mlx import kernels, linears, ops
from clsa_mlx.kernels.load import load
from clsa_mlx.trees import arrays_in

CONTEXT = 131072
_NO_LAUNCH = ("Broadcast", "Depends", "ExpandDims", "Full", "Reshape", "Slice", "Squeeze", "StopGradient", "Transpose")
_NODE = re.compile(r'\{ (\d+) \[label ="([^"]*)"')


@dataclass
class Opaque:
    """Stands in for MLX's GPU functions: on a machine without a GPU MLX would take them apart, or refuse."""

    config: ModelConfig
    names: list[str] = field(default_factory=list)
    bytes: int = 0  # read and written

    def launch(self, name: str, inputs: Sequence[Any], shapes: Sequence[Any], dtypes: Sequence[Any]) -> list[mx.array]:
        arrays = [x for x in inputs if isinstance(x, mx.array)]
        read = [x.nbytes for x in arrays]
        if name == "clsa_gather_attention":  # keys and values
            read[1:3] = [self.config.index_topk * x.nbytes // x.shape[0] for x in arrays[1:3]]
        self.names.append(name)
        self.bytes += sum(read) + sum(map(_size, shapes, dtypes))
        first = mx.depends(mx.zeros(shapes[0], dtypes[0]), arrays)
        return [first, *(mx.depends(mx.zeros(*made), [first]) for made in zip(shapes[1:], dtypes[1:], strict=True))]

    def rms_norm(self, x: mx.array, weight: mx.array, eps: float) -> mx.array:
        return self.launch("rms_norm", [x, weight], [x.shape], [x.dtype])[0]

    def attention(self, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array) -> mx.array:
        return self.launch("scaled_dot_product_attention", [q, k, v, mask], [q.shape], [q.dtype])[0]

    def dequantize(self, packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
        shape = (packed.shape[0], scales.shape[1] * group_size)
        return self.launch("dequantize", [packed, scales, biases], [shape], [scales.dtype])[0]

    def metal_kernel(self, name: str, **_: Any) -> Callable[..., list[mx.array]]:
        def launch(inputs: Any, output_shapes: Any, output_dtypes: Any, init_value: Any = None, **_: Any) -> Any:
            if init_value is not None:
                self.names.extend(["fill of outputs"] * len(output_shapes))
                self.bytes += sum(map(_size, output_shapes, output_dtypes))
            return self.launch(name, inputs, output_shapes, output_dtypes)

        return launch


def count_launches(config: ModelConfig, max_tokens: int, *, with_kernels: bool) -> Counter[str]:
    """Kernels, by name, of a decode step of one sequence at a context of `max_tokens`."""
    step, arrays = decode_step(config, max_tokens)
    with _as_on_metal(config, with_kernels=with_kernels) as opaque, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.dot"
        mx.export_to_dot(str(path), *mx.compile(step)(arrays))
        names = dict(_NODE.findall(path.read_text(encoding="utf-8"))).values()
    fused = ("elementwise, fused" if name.startswith("Compiled") else name for name in names)
    return Counter([*(name for name in fused if name not in _NO_LAUNCH), *opaque.names])


def count_bytes(config: ModelConfig, max_tokens: int) -> int:
    """Bytes that the kernels of that step read and write."""
    step, arrays = decode_step(config, max_tokens)
    names, values = zip(*tree_flatten(arrays), strict=True)
    events: list[dict[str, Any]] = []
    with _as_on_metal(config, with_kernels=True) as opaque:
        mx.export_function(events.append, lambda *xs: step(tree_unflatten(list(zip(names, xs, strict=True)))), *values)
    return opaque.bytes + sum(_node_bytes(event) for event in events if event["type"] == "primitive")


def _node_bytes(node: dict[str, Any]) -> int:
    if node["name"] in _NO_LAUNCH:
        return 0
    inputs, outputs = ([_size(*x[1:]) for x in node[side]] for side in ("inputs", "outputs"))
    if node["name"] == "Gather":
        return sum(inputs[1:]) + 2 * sum(outputs)
    if node["name"] == "Scatter":
        return sum(inputs[1:]) + inputs[-1]
    return sum(inputs) + sum(outputs)


def _size(shape: Sequence[int], dtype: mx.Dtype) -> int:
    return math.prod(shape) * dtype.size


def decode_step(config: ModelConfig, max_tokens: int) -> tuple[Callable[[Any], list[mx.array]], Any]:
    """The model as a function of a tree of arrays, and arrays that nobody has computed."""
    plan = make_plan(config)
    rows, dtype = max_tokens + PAGE_SIZE, ops.DTYPES[config.torch_dtype]
    heads = (config.num_key_value_heads, config.head_dim)
    window_shape = (config.sliding_window + 2, *heads)
    arrays = {
        "weights": [_weight_arrays(config, shape) for shape in tensor_shapes(config).values()],
        "memories": [
            [mx.zeros((rows, *heads), dtype), mx.zeros((rows, *heads), dtype)]
            + [mx.zeros((rows, config.index_head_dim), dtype)] * has_index
            for has_index in plan.memory_has_index
        ],
        "windows": [[mx.zeros(window_shape, dtype), mx.zeros(window_shape, dtype)] for _ in range(plan.num_windows)],
        "integers": {
            name: mx.zeros(1, mx.int32)
            for name in ("tokens", "positions", "sequence", "window_slots", "slot_mapping", "ring_mapping")
        },
        "block_table": mx.zeros((1, max_tokens // PAGE_SIZE), mx.int32),
    }

    def step(tree: Any) -> list[mx.array]:
        i = tree["integers"]
        queries = Queries(i["positions"], i["sequence"], tree["block_table"], i["window_slots"], (0, 1), (max_tokens,))
        batch = StepBatch(i["tokens"], queries, i["slot_mapping"], i["ring_mapping"], None, None)
        memories = tuple(Memory(*arrays, *[None] * (3 - len(arrays))) for arrays in tree["memories"])
        windows = tuple(Window(k, v, config.sliding_window) for k, v in tree["windows"])
        weights = [_weight(config, arrays) for arrays in tree["weights"]]
        params = nest(dict(zip(tensor_shapes(config), weights, strict=True)))
        logits, state = forward(ops, params, plan, batch, State(memories, windows))
        assert logits is not None
        return [logits, *arrays_in(state)]

    return step, arrays


def _weight_arrays(config: ModelConfig, shape: tuple[int, ...]) -> list[mx.array]:
    dtype, how = ops.DTYPES[config.torch_dtype], config.quantization
    if how is None or len(shape) == 1:
        return [mx.zeros(shape, dtype)]
    groups = (shape[0], shape[1] // how.group_size)
    packed = mx.zeros((shape[0], shape[1] * how.bits // 32), mx.uint32)
    return [packed, mx.zeros(groups, dtype), mx.zeros(groups, dtype)]


def _weight(config: ModelConfig, arrays: Sequence[mx.array]) -> Weight:
    how = config.quantization
    if how is None or len(arrays) == 1:
        return arrays[0]
    packed, scales, biases = arrays
    return QuantizedWeight(packed, scales, biases, how.group_size, how.bits)


def _joined(weights: Sequence[Weight]) -> Weight:
    """Weights that have been joined by an earlier step."""
    if len(weights) == 1:
        return weights[0]
    columns = zip(*([w.packed, w.scales, w.biases] if isinstance(w, QuantizedWeight) else [w] for w in weights))
    parts = [mx.zeros((sum(x.shape[0] for x in column), column[0].shape[1]), column[0].dtype) for column in columns]
    first = weights[0]
    if isinstance(first, QuantizedWeight):
        return replace(first, packed=parts[0], scales=parts[1], biases=parts[2])
    return parts[0]


@contextmanager
def _as_on_metal(config: ModelConfig, *, with_kernels: bool) -> Iterator[Opaque]:
    """MLX builds graphs as for a GPU, without launching anything."""
    opaque = Opaque(config)
    patched = [
        (mx, "default_device", lambda: mx.Device(mx.gpu)),
        (mx, "dequantize", opaque.dequantize),
        (mx.fast, "metal_kernel", opaque.metal_kernel),
        (mx.fast, "rms_norm", opaque.rms_norm),
        (mx.fast, "scaled_dot_product_attention", opaque.attention),
        (kernels, "enabled", with_kernels),
        (linears, "joined", _joined),
    ]
    load.cache_clear()
    with ExitStack() as stack:
        for owner, name, value in patched:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield opaque
    load.cache_clear()


def sizes_4b(bits: int | None = None) -> ModelConfig:
    """The 4B model, with weights in bfloat16 or of so many bits in groups of 64."""
    config = plan_config("4b", "clsa", CONTEXT)
    return config if bits is None else replace(config, quantization=Quantization(group_size=64, bits=bits))


def main() -> None:
    for name, config in (("bfloat16", sizes_4b()), ("4 bits", sizes_4b(4))):
        for with_kernels in (False, True):
            counts = count_launches(config, CONTEXT, with_kernels=with_kernels)
            print(f"{name}, {'kernels' if with_kernels else 'plain MLX'}: {counts.total()} launches a step")
            print("   " + ", ".join(f"{count} {name}" for name, count in counts.most_common()))
        moved, floor = count_bytes(config, CONTEXT), decode_bytes(config, CONTEXT, 1, 2).total
        print(f"{name}: {moved / 1e9:.3f} GB a step, {moved / floor:.4f} x the floor")


if __name__ == "__main__":
    main()
