"""The tests of the Metal kernels again, on a real Apple GPU instead of the harness."""

from __future__ import annotations

import pytest

from tests.metal.test_attend_window import test_shapes as test_attend_window_shapes
from tests.metal.test_attend_window import test_windows, test_windows_in_parts
from tests.metal.test_float8 import test_every_byte as test_float8_every_byte
from tests.metal.test_float8 import test_gather_attention as test_float8_gather_attention
from tests.metal.test_float8 import test_select as test_float8_select
from tests.metal.test_gather_attention import (
    test_infinite_scores,
    test_large_scores_do_not_overflow,
    test_lengths,
    test_only_scores_of_minus_infinity_give_zeros,
)
from tests.metal.test_gather_attention import test_shapes as test_gather_attention_shapes
from tests.metal.test_model import ops, test_prompts_and_decode_steps
from tests.metal.test_norms import test_add_rms_norm, test_norm_rope
from tests.metal.test_select import (
    test_index_dims,
    test_lengths_and_ties,
    test_long_texts,
    test_nan_and_infinite_elements_in_wide_keys,
    test_real_scores,
    test_special_scores,
)

pytestmark = [pytest.mark.mlx, pytest.mark.metal]

__all__ = [
    "ops",
    "test_add_rms_norm",
    "test_attend_window_shapes",
    "test_float8_every_byte",
    "test_float8_gather_attention",
    "test_float8_select",
    "test_gather_attention_shapes",
    "test_index_dims",
    "test_infinite_scores",
    "test_large_scores_do_not_overflow",
    "test_lengths",
    "test_lengths_and_ties",
    "test_long_texts",
    "test_nan_and_infinite_elements_in_wide_keys",
    "test_norm_rope",
    "test_only_scores_of_minus_infinity_give_zeros",
    "test_prompts_and_decode_steps",
    "test_real_scores",
    "test_special_scores",
    "test_windows",
    "test_windows_in_parts",
]
