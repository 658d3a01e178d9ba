"""CLSA checkpoints in mlx-lm: importing this module makes its load, generate, evaluate and server know them.

    import clsa_mlx.mlx_lm
    from mlx_lm import generate, load

`python -m clsa_mlx.mlx_lm server --model ...` runs mlx-lm's own command line. mlx-lm is not changed: the model type
"clsa" is one more module of `mlx_lm.models`, and one more configuration that transformers may meet beside a tokenizer.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version

from clsa.errors import BackendError
from clsa_mlx.device import backend

_OLDEST = (0, 32)  # prompt caches that save all of their state by `state`
_INSTALL = "pip install 'mlx-lm>=0.32' would help"


def _check() -> None:
    """Raise BackendError, in one sentence, if MLX or mlx-lm is missing or too old."""
    devices = backend.devices()
    if not any(device.usable for device in devices):
        raise BackendError(f"clsa_mlx.mlx_lm needs MLX: {devices[0].reason}")
    try:
        found = version("mlx-lm")
    except PackageNotFoundError:
        raise BackendError(f"mlx-lm is not installed; {_INSTALL}") from None
    if tuple(int(part) for part in found.split(".")[:2] if part.isdigit()) < _OLDEST:
        raise BackendError(f"mlx-lm {found} is older than 0.32; {_INSTALL}")
    try:
        import mlx_lm  # noqa: F401
    except Exception as error:
        raise BackendError(f"mlx-lm {found} cannot be imported ({' '.join(str(error).split())}); {_INSTALL}") from error


def _register() -> None:
    """Tell mlx-lm and transformers about the model type "clsa"."""
    # As the backend does: TF32 would round the float32 products of the index to 10 bits.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    _check()
    import mlx_lm.models.cache
    from transformers import AutoConfig, PreTrainedConfig

    from clsa_mlx import mlx_lm_model
    from clsa_mlx.mlx_lm_cache import ClsaCache

    class ClsaConfig(PreTrainedConfig):
        """What transformers sees of config.json while it loads the tokenizer. ModelConfig checks it, not this."""

        model_type = "clsa"

        def validate_layer_type(self) -> None: ...

    AutoConfig.register("clsa", ClsaConfig, exist_ok=True)
    sys.modules["mlx_lm.models.clsa"] = mlx_lm_model
    vars(mlx_lm.models.cache)["ClsaCache"] = ClsaCache  # where load_prompt_cache looks for the class by its name


_register()

if __name__ == "__main__":
    from mlx_lm.cli import main

    main()
