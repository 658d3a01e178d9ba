"""How far a backend may be from the float64 specification: one table, the same everywhere it is tested."""

from __future__ import annotations

import numpy as np

# Relative root-mean-square error by dtype of the inputs. Results are rounded to that dtype once (2^-24, 2^-9, 2^-12
# relative at most); the rest is room for float32 sums in another order, and for backends that round the weights of a
# softmax, or silu, to the dtype on the way.
DEFAULT = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}
TOLERANCE: dict[str, dict[str, float]] = {
    "norm_rope": {"float32": 3e-5, "bfloat16": 6e-3, "float16": 8e-4},  # float32 angles, at positions up to 1000
    "linear": {"float32": 3e-6, "bfloat16": 6e-3, "float16": 8e-4},  # the same product in another order
    "norm_linears": {"float32": 5e-6, "bfloat16": 8e-3, "float16": 1e-3},  # a norm and a product, each rounded
    "norm_swiglu": {"float32": 5e-6, "bfloat16": 1.2e-2, "float16": 1.6e-3},
    "close_layer": {"float32": 5e-6, "bfloat16": 1e-2, "float16": 1.3e-3},
    "add_linear": {"float32": 3e-6, "bfloat16": 6e-3, "float16": 8e-4},
    "attend_window": {"float32": 3e-5, "bfloat16": 1.2e-2, "float16": 1.6e-3},
    "swiglu": {"float32": 2e-6, "bfloat16": 6e-3, "float16": 8e-4},
    # Weights of many levels are rounded to the dtype by some, and on Metal term by term: scale * q, then + bias.
    "quantized": {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3},
    "float8_swiglu": {"float32": 5e-6, "bfloat16": 1.8e-2, "float16": 2.4e-3},  # of weights rounded to the dtype
    "gather_attention": {"float32": 5e-6, "bfloat16": 5e-3, "float16": 7e-4},
    "dense_attention": {"float32": 5e-6, "bfloat16": 5e-3, "float16": 7e-4},
    "sliding_attention": {"float32": 5e-6, "bfloat16": 5e-3, "float16": 7e-4},
    "logprobs": {"float32": 5e-6},
    "gumbel": {"float32": 5e-6},
    "logits": {"float32": 5e-5},
}
# A score may differ from the exact one by this share of |q| |k|; scores closer than that are a tie.
SCORE_ERROR = {"float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6}


def tolerance(op: str, dtype: str) -> float:
    return TOLERANCE.get(op, DEFAULT)[dtype]


def relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||, and the plain norm of the difference where `want` is zero; NaN never passes."""
    difference = np.linalg.norm(np.asarray(got, np.float64) - want)
    scale = np.linalg.norm(np.asarray(want, np.float64))
    return float(difference / scale) if scale > 0 else float(difference)


def assert_close(op: str, dtype: str, got: np.ndarray, want: np.ndarray, case: object = "") -> None:
    """Fail with the case, the error and the first wrong coordinate if `got` is not `want` within the table."""
    assert got.shape == want.shape, f"{op} {dtype} {case}: shape {got.shape}, wanted {want.shape}"
    limit = tolerance(op, dtype)
    error = relative_rms(got, want)
    if error <= limit:
        return
    scale = max(float(np.sqrt(np.mean(np.square(want, dtype=np.float64)))), 1e-30)
    allowed = limit * np.maximum(np.abs(want), scale)
    wrong = np.argwhere(~(np.abs(np.asarray(got, np.float64) - want) <= allowed))
    where = tuple(int(i) for i in wrong[0])
    raise AssertionError(
        f"{op} {dtype} {case}: relative RMS error {error:.3g} > {limit:g}; {len(wrong)} of {got.size} elements, "
        f"first at {where}: got {got[where]!r}, wanted {want[where]!r}"
    )


def assert_equal(op: str, got: np.ndarray, want: np.ndarray, case: object = "") -> None:
    """Fail with the case and the first wrong coordinate if the integers differ."""
    assert got.shape == want.shape, f"{op} {case}: shape {got.shape}, wanted {want.shape}"
    wrong = np.argwhere(got != want)
    if len(wrong):
        where = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"{op} {case}: {len(wrong)} of {got.size} elements differ, first at {where}: "
            f"got {got[where]!r}, wanted {want[where]!r}; the row: {got[where[:1]]} wanted {want[where[:1]]}"
        )
