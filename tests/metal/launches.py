"""How many kernels the GPU is asked to run for one decode step of the 4B model at 128K tokens.

Run as: python -m tests.metal.launches

MLX's own graph of the step is counted, without a GPU and without computing anything: the step is traced as on Metal,
compiled as `mx.compile` does it (which makes one kernel of neighbouring elementwise functions), and every node counts
that is no view of another array. A sort or partition of long rows, which is several kernels, counts as one, so the
figure for plain MLX is a lower bound.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

from clsa.bench.sizes import plan_config
from clsa.config import PAGE_SIZE, ModelConfig
from clsa.model import forward
from clsa.ops import Memory, Queries, State, StepBatch, Window
from clsa.params import nest, tensor_shapes
from clsa.plan import make_plan
from clsa_mlx import kernels, ops
from clsa_mlx.kernels.load import load

_NO_LAUNCH = ("Broadcast", "Depends", "ExpandDims", "Full", "Reshape", "Slice", "Squeeze", "StopGradient", "Transpose")
_NODE = re.compile(r'\{ (\d+) \[label ="([^"]*)"')


def count_launches(config: ModelConfig, max_tokens: int, *, with_kernels: bool) -> Counter[str]:
    """Kernels, by name, of a decode step of one sequence at a context of `max_tokens`."""
    step, arrays = decode_step(config, max_tokens)
    with _as_on_metal(with_kernels) as opaque, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.dot"
        mx.export_to_dot(str(path), *mx.compile(step)(arrays))
        names = dict(_NODE.findall(path.read_text(encoding="utf-8"))).values()
    fused = ("elementwise, fused" if name.startswith("Compiled") else name for name in names)
    return Counter([*(name for name in fused if name not in _NO_LAUNCH), *opaque])


def decode_step(config: ModelConfig, max_tokens: int) -> tuple[Callable[[Any], list[mx.array]], Any]:
    """The model as a function of a tree of arrays, and arrays that nobody has computed."""
    plan = make_plan(config)
    rows, dtype = max_tokens + PAGE_SIZE, ops.DTYPES[config.torch_dtype]
    heads = (config.num_key_value_heads, config.head_dim)
    window_shape = (config.sliding_window + 2, *heads)
    arrays = {
        "params": nest({name: mx.zeros(shape, dtype) for name, shape in tensor_shapes(config).items()}),
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
        logits, state = forward(ops, tree["params"], plan, batch, State(memories, windows))
        assert logits is not None
        return [logits, *ops._arrays(state)]

    return step, arrays


@contextmanager
def _as_on_metal(with_kernels: bool) -> Iterator[list[str]]:
    """MLX builds graphs as for a GPU; yields the names of kernels that are no node of them."""
    opaque: list[str] = []

    def stand_in(name: str, inputs: Sequence[Any], shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        # On a machine without a GPU MLX would take these functions apart, or refuse.
        opaque.append(name)
        return mx.depends(mx.zeros(shape, dtype), [x for x in inputs if isinstance(x, mx.array)])

    def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        return stand_in("rms_norm", [x, weight], x.shape, x.dtype)

    def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array) -> mx.array:
        return stand_in("scaled_dot_product_attention", [q, k, v, mask], q.shape, q.dtype)

    def metal_kernel(name: str, **_: Any) -> Callable[..., list[mx.array]]:
        def launch(
            inputs: Any, output_shapes: Any, output_dtypes: Any, init_value: Any = None, **_: Any
        ) -> list[mx.array]:
            opaque.extend(["fill of outputs"] * (0 if init_value is None else len(output_shapes)))
            first = stand_in(name, inputs, output_shapes[0], output_dtypes[0])
            others = zip(output_shapes[1:], output_dtypes[1:])
            return [first, *(mx.depends(mx.zeros(shape, dtype), [first]) for shape, dtype in others)]

        return launch

    patched = [
        (mx, "default_device", lambda: mx.Device(mx.gpu)),
        (mx.fast, "metal_kernel", metal_kernel),
        (mx.fast, "rms_norm", rms_norm),
        (mx.fast, "scaled_dot_product_attention", attention),
        (kernels, "enabled", with_kernels),
    ]
    load.cache_clear()
    with ExitStack() as stack:
        for owner, name, value in patched:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield opaque
    load.cache_clear()


def main() -> None:
    config = plan_config("4b", "clsa", 131072)
    for with_kernels in (False, True):
        counts = count_launches(config, 131072, with_kernels=with_kernels)
        print(f"{'kernels' if with_kernels else 'plain MLX'}: {counts.total()} launches a step")
        print("   " + ", ".join(f"{count} {name}" for name, count in counts.most_common()))


if __name__ == "__main__":
    main()
