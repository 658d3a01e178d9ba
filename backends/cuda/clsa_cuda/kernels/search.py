"""Keys of scores, and the search for the best of them in lists: what `pick` is made of.

Lists lie in one row of memory, list r from base[r] with count[r] keys. A program holds their first block as a tile
[ROWS, LENGTH], with ABSENT where no key is, and reads on block by block where the longest list has more.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Keys are int32 in the order of scores. The lowest int32 is the key of no score: nothing is there.
ABSENT = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)
_LARGEST = tl.constexpr(3.0e38)


@triton.jit
def keys_of(scores):
    """int32 in the order of float32 scores: NaN is -inf, -0.0 equals 0.0."""
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _finite_score(key):
    bits = key.to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.minimum(tl.maximum(bits.to(tl.float32, bitcast=True), -_LARGEST), _LARGEST)


@triton.jit
def load_keys(values, base, count, start, capacity, LENGTH: tl.constexpr):
    """[ROWS, LENGTH]: keys from `start` of the lists.

    The load is masked by the capacity alone, which leaves it wide and lets it go before the counts are known.
    """
    i = start + tl.arange(0, LENGTH)[None, :]
    tile = tl.load(values + base[:, None] + i, mask=base[:, None] + i < capacity, other=ABSENT)
    return tl.where(i < count[:, None], tile, ABSENT)


@triton.jit
def _reaching(tile, a, b):
    """Whether keys reach a in the lower and b >= a in the upper 16 bits: a tile has at most 32768 keys."""
    return tl.where(tile >= b, 0x10001, (tile >= a).to(tl.int32))


@triton.jit
def both(flags):
    """The lower and the upper 16 bits."""
    flags = flags.to(tl.uint32, bitcast=True)
    return (flags & 0xFFFF).to(tl.int32), (flags >> 16).to(tl.int32)


@triton.jit
def _reach(tile, values, base, count, longest, capacity, a, b, LENGTH: tl.constexpr):
    """How many keys of the lists reach a, and how many reach b >= a; `tile` is their first block."""
    reach_a, reach_b = both(tl.sum(_reaching(tile, a, b)))
    for start in range(LENGTH, longest, LENGTH):
        more = load_keys(values, base, count, start, capacity, LENGTH)
        more_a, more_b = both(tl.sum(_reaching(more, a, b)))
        reach_a += more_a
        reach_b += more_b
    return reach_a, reach_b


@triton.jit
def search(tile, values, base, count, longest, capacity, want, slack, reach_low, low, high, LENGTH: tl.constexpr):
    """A key that at least `want` keys reach, and how many of those that equal it belong to the `want`.

    It lies in [low, high]; `reach_low` >= want keys reach low and none high + 1. It is the highest such key, or any
    that no more than `slack` too many reach: with no slack it separates as well as the highest one. Each step counts at
    the middle of what is left, so that 32 steps do for any keys, and where the scores would put it if the logarithm of
    the count fell evenly with the score: about 4 steps to a slack of an eighth for most distributions.
    """
    low, high = low.to(tl.int64), high.to(tl.int64)
    high = tl.where(reach_low - want <= slack, low, high)
    reach_high = tl.full([], 0, tl.int32)  # how many keys reach high + 1
    target = tl.log2(tl.maximum(want, 1).to(tl.float32) + 0.5 * slack)
    while low < high:
        middle = high - (high - low) // 2
        top = tl.log2(reach_low.to(tl.float32))
        part = (top - target) / (top - tl.log2(tl.maximum(reach_high.to(tl.float32), 0.5)))
        guess = keys_of(_finite_score(low) * (1.0 - part) + _finite_score(high) * part).to(tl.int64)
        guess = tl.minimum(tl.maximum(guess, low + 1), high)
        a, b = tl.minimum(guess, middle), tl.maximum(guess, middle)
        reach_a, reach_b = _reach(tile, values, base, count, longest, capacity, a.to(tl.int32), b.to(tl.int32), LENGTH)
        high = tl.where(reach_a < want, a - 1, tl.where(reach_b < want, b - 1, high))
        reach_high = tl.where(reach_a < want, reach_a, tl.where(reach_b < want, reach_b, reach_high))
        low = tl.where(reach_b >= want, b, tl.where(reach_a >= want, a, low))
        reach_low = tl.where(reach_b >= want, reach_b, tl.where(reach_a >= want, reach_a, reach_low))
        high = tl.where(reach_low - want <= slack, low, high)
    return low.to(tl.int32), tl.where(reach_low == want, want, want - reach_high)


@triton.jit
def lowest_and_highest(tile, values, base, count, longest, capacity, LENGTH: tl.constexpr):
    """The lowest key of the lists and the highest; `tile` is their first block."""
    low, high = tl.where(tile == ABSENT, _HIGHEST, tile), tile
    for start in range(LENGTH, longest, LENGTH):
        more = load_keys(values, base, count, start, capacity, LENGTH)
        low = tl.minimum(low, tl.where(more == ABSENT, _HIGHEST, more))
        high = tl.maximum(high, more)
    return tl.min(low), tl.max(high)
