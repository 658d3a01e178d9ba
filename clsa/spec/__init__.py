"""The specification: what every op means, in NumPy float64, one obvious line after the other.

Every fast op of every backend is held against the function of the same name here. It is also the backend
"numpy": complete, exact, slow. Weights are rounded to the asked dtype when they arrive; everything after that
is float64. The letters in shapes are those of `clsa.ops`.

`arrays` holds what is given and taken, `layers` the model's plain functions, `state` memory and windows, `attention`
routing and reading, `sampling` the way to a token, `training` the indexer's loss.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import cast as typing_cast

from clsa.errors import BackendError
from clsa.ops import Device, Ops, StepSize
from clsa.spec.arrays import (
    asarray,
    asarrays,
    cast,
    concat,
    evaluate,
    fetch,
    float8_weight,
    itemsize,
    memory_stats,
    quantized_weight,
    record,
    take,
    to_numpy,
    wide,
)
from clsa.spec.attention import (
    attend,
    attend_window,
    dense_attention,
    gather_attention,
    physical_rows,
    select,
    sliding_attention,
    take_selection,
    top_k,
)
from clsa.spec.layers import (
    add_linear,
    close_layer,
    embed,
    linear,
    linears,
    norm_linears,
    norm_rope,
    norm_swiglu,
    rms_norm,
    rope,
    swiglu,
)
from clsa.spec.sampling import (
    filter_logits,
    gumbel,
    penalize,
    sample,
    threefry2x32,
)
from clsa.spec.state import (
    copy_window,
    new_memory,
    new_window,
    write_memory,
    write_window,
)
from clsa.spec.training import (
    index_kd_loss,
    softmax,
    teacher,
)

name = "numpy"
device = "cpu (NumPy float64, the specification)"
step_size = StepSize(32, 2048)
temporary_bytes = 1 << 28  # a query at a time
records_rest = False
keeps_quantized = False
no_fp8: Mapping[str, str] = {}


class _NumpyBackend:
    name = name

    def devices(self) -> list[Device]:
        return [Device("cpu", "cpu", True, "NumPy float64: exact and slow, the specification of every op")]

    def open(self, device: str | None = None) -> Ops:
        if device not in (None, "cpu"):
            raise BackendError(f"backend 'numpy' runs on device 'cpu' only, got {device!r}")
        return typing_cast(Ops, sys.modules[__name__])


backend = _NumpyBackend()

__all__ = [
    "add_linear",
    "asarray",
    "asarrays",
    "attend",
    "attend_window",
    "backend",
    "cast",
    "close_layer",
    "concat",
    "copy_window",
    "dense_attention",
    "device",
    "embed",
    "evaluate",
    "fetch",
    "filter_logits",
    "float8_weight",
    "gather_attention",
    "gumbel",
    "index_kd_loss",
    "itemsize",
    "keeps_quantized",
    "linear",
    "linears",
    "memory_stats",
    "name",
    "new_memory",
    "new_window",
    "no_fp8",
    "norm_linears",
    "norm_rope",
    "norm_swiglu",
    "penalize",
    "physical_rows",
    "quantized_weight",
    "record",
    "records_rest",
    "rms_norm",
    "rope",
    "sample",
    "select",
    "sliding_attention",
    "softmax",
    "step_size",
    "swiglu",
    "take",
    "take_selection",
    "teacher",
    "temporary_bytes",
    "threefry2x32",
    "to_numpy",
    "top_k",
    "wide",
    "write_memory",
    "write_window",
]
