"""Cross-Layer Sparse Attention: one model, one shared memory, one index (arXiv:2606.06467).

    import clsa

    llm = clsa.load("demo")
    print(llm.generate(["def fibonacci(n):"])[0].text)

Public names are imported when they are first used, so that `import clsa` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clsa.errors import BackendError, CheckpointError, ClsaError, ConfigError, RequestError, TrainError

if TYPE_CHECKING:
    from clsa.backend import backends
    from clsa.config import EngineConfig, ModelConfig, SamplingParams
    from clsa.llm import LLM, load
    from clsa.outputs import Piece, RequestOutput

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BackendError",
    "CheckpointError",
    "ClsaError",
    "ConfigError",
    "EngineConfig",
    "ModelConfig",
    "Piece",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TrainError",
    "__version__",
    "backends",
    "load",
]

_LAZY = {
    "LLM": "clsa.llm",
    "load": "clsa.llm",
    "EngineConfig": "clsa.config",
    "ModelConfig": "clsa.config",
    "SamplingParams": "clsa.config",
    "Piece": "clsa.outputs",
    "RequestOutput": "clsa.outputs",
    "backends": "clsa.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'clsa' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
