"""Float8 E4M3 on the host: what "fp8" means on every backend.

The "fn" format: 4 bits of exponent with bias 7, 3 of mantissa, no infinities; the largest number is 448, the smallest
2^-9. A number is rounded from float32 to the nearest, ties to even; what is beyond 448, infinity too, becomes 448 with
its sign; NaN stays NaN. Every E4M3 number is exact in float32, bfloat16 and float16.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from clsa.ops import Float8Weight

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
MAX_FLOAT8 = 448.0


def to_float8(x: np.ndarray) -> np.ndarray:
    """Round an array of floats to E4M3."""
    return np.clip(x.astype(np.float32), -MAX_FLOAT8, MAX_FLOAT8).astype(FLOAT8)


def float8_weight(weight: np.ndarray) -> Float8Weight:
    """Give each row of a matrix [out, in] the scale at which its largest number is 448."""
    wide = weight.astype(np.float32)
    scales = np.abs(wide).max(axis=1) / np.float32(MAX_FLOAT8)
    scales = np.where(scales == 0, np.float32(1), scales)
    return Float8Weight(to_float8(wide / scales[:, None]), scales)
