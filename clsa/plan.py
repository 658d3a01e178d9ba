"""From layer types and index pattern to: who writes, who reads, who routes, where a prompt may stop.

Nothing else in the program asks what kind of model this is. The five plans of the paper and its neighbours are
values of two config keys:

    Transformer  all full_attention,    "DDDD..."      IndexCache  all full_attention,  "FSSSFSSS..."
    DSA          all full_attention,    "FFFF..."      YOCO        sliding then cross,  "DDDD..."
    CLSA         sliding then cross,    "FSSS..."
"""

from __future__ import annotations

from dataclasses import dataclass

from clsa.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer does with state. Indices point into `State.memories` and `State.windows`."""

    kind: str  # a LAYER_TYPES entry
    window: int | None  # the ring it writes and reads
    memory: int | None  # the memory it reads
    writes_memory: bool  # it also writes that memory, before reading
    route: str | None  # F, S or D for layers that read a memory

    @property
    def writes_state(self) -> bool:
        return self.writes_memory or self.window is not None


@dataclass(frozen=True, slots=True)
class Plan:
    """The walk through the layers.

    `exit_layer` is the last layer that writes state: a prompt position whose logits are not wanted ends there
    (right after the write where a memory is written, after the layer where a window is). -1 if no layer does.
    """

    config: ModelConfig
    layers: tuple[LayerPlan, ...]
    memory_has_index: tuple[bool, ...]  # per memory: some layer routes on it
    num_windows: int
    exit_layer: int

    @property
    def num_memories(self) -> int:
        return len(self.memory_has_index)


def make_plan(config: ModelConfig) -> Plan:
    """Derive the plan. Cross layers share one memory, written at the first of them; full layers own theirs."""
    letters = iter(config.index_topk_pattern)
    layers: list[LayerPlan] = []
    has_index: list[bool] = []
    num_windows = 0
    cross_memory: int | None = None
    for kind in config.layer_types:
        if kind == "sliding_attention":
            layers.append(LayerPlan(kind, num_windows, None, False, None))
            num_windows += 1
            continue
        route = next(letters)
        writes = kind == "full_attention" or cross_memory is None
        if writes:
            has_index.append(False)
        memory = len(has_index) - 1 if writes else cross_memory
        assert memory is not None
        if kind == "cross_attention":
            cross_memory = memory
        has_index[memory] |= route == "F"
        layers.append(LayerPlan(kind, None, memory, writes, route))
    exit_layer = max((i for i, layer in enumerate(layers) if layer.writes_state), default=-1)
    return Plan(config, tuple(layers), tuple(has_index), num_windows, exit_layer)
