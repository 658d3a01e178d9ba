"""Every error a user can cause. One sentence each: what, where, got, wanted, what to do."""

from __future__ import annotations


class ClsaError(Exception):
    """Base class of all errors that clsa raises on purpose."""


class ConfigError(ClsaError, ValueError):
    """A configuration value is unknown, missing, of the wrong type or out of bounds."""


class CheckpointError(ClsaError):
    """A checkpoint is missing, malformed, or does not match its config."""


class BackendError(ClsaError):
    """A backend is unknown or cannot run here; the sentence says why and what would help."""


class RequestError(ClsaError, ValueError):
    """A request is refused before it uses anything: empty, too long, or with bad parameters."""


class TrainError(ClsaError):
    """A training run cannot start or go on."""
