// What MLX puts in front of every custom kernel (its kernels/utils.h), as far as kernels use it.
#pragma once

#include "math.h"

using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;

#define METAL_FUNC inline __attribute__((always_inline))
#define MLX_MTL_CONST static constexpr const
#define MLX_MTL_PRAGMA_UNROLL

template <class U>
struct Limits {
  static constexpr U finite_max = metal::numeric_limits<U>::max();
  static constexpr U finite_min = metal::numeric_limits<U>::lowest();
  static constexpr U bound(bool upper) {
    if constexpr (metal::is_floating<U>) {
      const U infinity = metal::numeric_limits<U>::infinity();
      return upper ? infinity : -infinity;
    } else {
      return upper ? finite_max : finite_min;
    }
  }
  static constexpr U max = bound(true);
  static constexpr U min = bound(false);
};

template <class T, class U>
constexpr T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}

// The offset of element number `elem`, counted row by row, in an array with strides.
template <class Index = int64_t>
Index elem_to_loc(Index elem, const int* shape, const int64_t* strides, int ndim) {
  Index location = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    location += (elem % shape[i]) * Index(strides[i]);
    elem /= shape[i];
  }
  return location;
}

inline float log1p(float x) { return __builtin_log1pf(x); }
inline bfloat log1p(bfloat x) { return bfloat(__builtin_log1pf(x)); }
