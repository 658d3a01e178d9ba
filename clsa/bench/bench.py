"""What all benchmarks of one run share: the device, the clock, the ceilings, the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from clsa.backend import load_backend
from clsa.bench.peers import device_timer
from clsa.bench.random_arrays import random_params
from clsa.bench.report import Column, Report, Row, machine
from clsa.bench.sizes import PLANS, plan_config
from clsa.bench.timing import Ceilings, Stopwatch, measure_ceilings
from clsa.checkpoint import open_checkpoint
from clsa.config import DTYPES, MAX_TOKENS, EngineConfig, ModelConfig, check_float, check_int, show
from clsa.errors import RequestError
from clsa.hub import resolve
from clsa.ops import Ops
from clsa.weights import check_float8, load_weights

Params = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked for on the command line. Raises RequestError on values out of bounds."""

    backend: str = "auto"
    device: str | None = None
    dtype: str | None = None  # None: float32 on a CPU, bfloat16 elsewhere
    kv_dtype: str | None = None  # "fp8", or None for that dtype; also the next two
    index_dtype: str | None = None
    weight_dtype: str | None = None
    sizes: str = "4b"
    model: str | None = None  # a checkpoint, in place of sizes and plans
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    plans: tuple[str, ...] = PLANS
    seconds: float = 2.0  # for each figure
    tokens_per_step: int = 2048  # of prefill
    peers: bool = True

    def __post_init__(self) -> None:
        for name, values, high in (("contexts", self.contexts, MAX_TOKENS // 2), ("batches", self.batches, 4096)):
            if not 1 <= len(values) <= 64:
                raise RequestError(f"{name} must be 1 to 64 integers, got {show(values)}")
            for value in values:
                check_int(name, value, 1, high, RequestError)
        plan_config(self.sizes, PLANS[0], 1)  # refuses an unknown name, before anything runs
        if unknown := [plan for plan in self.plans if plan not in PLANS] or not self.plans:
            raise RequestError(f"plans must be among {', '.join(PLANS)}, got {show(unknown)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RequestError(f"dtype must be one of {', '.join(DTYPES)}, got {show(self.dtype)}")
        self.engine  # noqa: B018  it refuses other dtypes
        check_float("seconds", self.seconds, 0.001, 3600, RequestError)
        check_int("tokens_per_step", self.tokens_per_step, 1, 1 << 20, RequestError)

    @property
    def engine(self) -> EngineConfig:
        """What is kept in 8 bits, as the engine takes it. Raises ConfigError on other dtypes."""
        return EngineConfig(kv_dtype=self.kv_dtype, index_dtype=self.index_dtype, weight_dtype=self.weight_dtype)


class Bench:
    """An open device, and what is measured on it once. `note` reports progress, one line at a time."""

    def __init__(self, settings: Settings, note: Callable[[str], None]) -> None:
        self.settings, self.note = settings, note
        self._checkpoint = None if settings.model is None else open_checkpoint(resolve(settings.model))
        self.ops: Ops = load_backend(settings.backend, settings.device)[0]
        default = "float32" if self.ops.device.startswith("cpu") else "bfloat16"
        self.dtype = settings.dtype or default
        self.stored, self.weight_dtype = settings.engine.memory_dtypes, settings.weight_dtype
        check_float8(self.ops, self.config(self.plans[0], 1), settings.engine)
        self.checked: dict[tuple[object, ...], str | None] = {}  # what was checked -> what is wrong with it
        self.stopwatch = Stopwatch(self.ops, device_timer(self.ops), settings.seconds)

    @property
    def itemsize(self) -> int:
        return self.ops.itemsize(self.dtype)

    @cached_property
    def ceilings(self) -> Ceilings:
        self.note("measuring the machine's ceilings")
        return measure_ceilings(self.ops, self.stopwatch, self.dtype)

    def config(self, plan: str, max_tokens: int) -> ModelConfig:
        """The config of a plan, or the checkpoint's, for sequences of at most `max_tokens`."""
        if self._checkpoint is None:
            return plan_config(self.settings.sizes, plan, max_tokens)
        config = self._checkpoint.config
        quantization = config.quantization if self.ops.keeps_quantized else None
        return replace(config, max_position_embeddings=max_tokens, quantization=quantization)

    @property
    def plans(self) -> tuple[str, ...]:
        """Names of what is compared; a checkpoint has one plan of its own."""
        return self.settings.plans if self._checkpoint is None else (Path(str(self.settings.model)).name,)

    def params(self, config: ModelConfig) -> Params:
        """The checkpoint's weights, or random ones."""
        if self._checkpoint is None:
            self.note(f"weights of {config.num_hidden_layers} layers")
            return random_params(self.ops, config, self.dtype, self.weight_dtype)
        return load_weights(self.ops, self._checkpoint, self.dtype, self.weight_dtype)

    def report(self, name: str, columns: list[Column], **facts: Any) -> Report:
        """An empty report with what holds for every row."""
        weights = "random" if self._checkpoint is None else "of the checkpoint"
        model = self.settings.sizes if self._checkpoint is None else str(self.settings.model)
        shared: Row = {"machine": machine(self.ops), "dtype": self.dtype, "sizes": model, "weights": weights}
        shared |= {"kv_dtype": self.stored.kv, "index_dtype": self.stored.index, "weight_dtype": self.weight_dtype}
        shared["seconds_per_figure"] = self.settings.seconds
        return Report(name, columns, shared | facts)

    def ceiling_facts(self) -> Row:
        """The ceilings, for a report."""
        c = self.ceilings
        return {
            "ceilings": {
                "read_bytes_per_second": round(c.read),
                "read_by": c.read_by,
                "matmul_flop_per_second": round(c.matmul),
            }
        }
