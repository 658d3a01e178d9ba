"""The backend "mlx": Apple GPUs through Metal, and CPUs. Importing this package does not import mlx."""

from __future__ import annotations

from clsa_mlx.device import backend

__all__ = ["backend"]
