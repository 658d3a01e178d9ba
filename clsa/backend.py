"""Which backends are installed, what they can run on, and the choice of one: made once, at load.

A backend is found through the entry-point group `clsa.backends` and in no other way. Each entry names an
object that satisfies `clsa.ops.Backend`; this module never imports a backend by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from clsa.errors import BackendError, ClsaError
from clsa.ops import Backend, Device, Ops

GROUP = "clsa.backends"
_KINDS = ("nvidia", "metal", "cpu")  # best first
_NAMES = ("mlx", "cuda", "numpy")  # best first among backends that offer the same kind of device


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One installed backend. `error` says why it cannot be imported or asked; it then has no devices."""

    name: str
    devices: tuple[Device, ...]
    error: str | None = None


def backends() -> list[BackendInfo]:
    """Every installed backend, best first, with all its devices, usable or not.

    A backend that is broken is listed with its error. Raises BackendError if clsa itself is not installed.
    """
    return [_inspect(name, entry) for name, entry in _entries().items()]


def load_backend(name: str = "auto", device: str | None = None) -> tuple[Ops, str]:
    """Open a backend; return its ops, and a phrase that says which one it is and why.

    Args:
        name: an installed backend, or "auto": NVIDIA, then Metal, then CPU, whatever backend offers it.
        device: a device's name as `backends()` lists it; None takes the best.

    Raises BackendError if the backend is unknown or cannot run here. Nothing else is tried in its place.
    """
    if device is not None and not isinstance(device, str):
        raise BackendError(f"device must be a string such as 'cpu', or None, got {device!r}")
    if name == "auto":
        return _open_best(device)
    entries = _entries()
    if name not in entries:
        raise BackendError(f"backend must be 'auto' or one of {', '.join(entries)}, got {name!r}")
    ops = _open(name, entries[name], device)
    return ops, f"{ops.name} on {ops.device} (as asked)"


def _open_best(device: str | None) -> tuple[Ops, str]:
    entries = _entries()
    offers: list[tuple[int, str, Device]] = []
    refusals: list[str] = []
    for info in (_inspect(name, entry) for name, entry in entries.items()):
        if info.error is not None:
            refusals.append(f"{info.name}: {info.error}")
        for offer in info.devices:
            if device is not None and offer.name != device:
                continue
            if offer.usable:
                offers.append((_rank(offer.kind, _KINDS), info.name, offer))
            else:
                refusals.append(f"{info.name} on {offer.name}: {offer.reason}")
    if not offers:
        wanted = "any device" if device is None else f"device {device!r}"
        why = "; ".join(refusals) or "no backend lists it"
        raise BackendError(f"no backend can run on {wanted} here ({why}); `clsa info` lists what can")
    _, name, best = min(offers, key=lambda offer: offer[0])  # stable: entries come best first
    ops = _open(name, entries[name], best.name)
    return ops, f"{ops.name} on {ops.device} (auto takes NVIDIA, then Metal, then CPU)"


def _open(name: str, entry: EntryPoint, device: str | None) -> Ops:
    try:
        return _load(entry).open(device)
    except ClsaError:
        raise
    except Exception as error:
        raise BackendError(f"backend {name!r} cannot run here: {_reason(name, error)}") from error


def _inspect(name: str, entry: EntryPoint) -> BackendInfo:
    try:
        return BackendInfo(name, tuple(_load(entry).devices()))
    except Exception as error:  # a broken plug-in of someone else must not hide the others
        return BackendInfo(name, (), _reason(name, error))


def _load(entry: EntryPoint) -> Backend:
    backend: Backend = entry.load()
    if missing := [part for part in ("name", "devices", "open") if not hasattr(backend, part)]:
        raise BackendError(f"{entry.value!r} is not a backend: it has no {' and no '.join(missing)}")
    return backend


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, ClsaError):
        return str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ImportError) and name in _NAMES:
        extra = "clsa" if name == "numpy" else f"clsa[{name}]"
        return f'{text}; pip install "{extra}" would help'
    return text


def _entries() -> dict[str, EntryPoint]:
    """The installed backends by name, best first."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if not found:
        raise BackendError(f"no backend is registered under {GROUP!r}: install clsa, e.g. `pip install -e .`")
    return {name: found[name] for name in sorted(found, key=lambda name: (_rank(name, _NAMES), name))}


def _rank(value: str, order: tuple[str, ...]) -> int:
    return order.index(value) if value in order else len(order)
