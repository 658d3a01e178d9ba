// The math of <metal_math> that kernels use: float functions, the same through float for half and bfloat, and
// element by element for vectors. fast:: and precise:: are the same functions here; on a GPU they differ, so
// results are compared with tolerances.
#pragma once

#include "vector.h"

namespace metal {

namespace precise = ::metal;
namespace fast = ::metal;

#define MATH_FUNCTION(name, expression)                                  \
  inline float name(float x) { return expression; }                      \
  template <class F>                                                     \
  inline small_float<F> name(small_float<F> x) {                         \
    return small_float<F>(name(static_cast<float>(x)));                  \
  }                                                                      \
  template <class T, int N>                                              \
  inline vec<T, N> name(vec<T, N> x) {                                   \
    for (int i = 0; i < N; ++i) x[i] = name(x[i]);                       \
    return x;                                                            \
  }
MATH_FUNCTION(exp, __builtin_expf(x))
MATH_FUNCTION(exp2, __builtin_exp2f(x))
MATH_FUNCTION(exp10, __builtin_powf(10.0f, x))
MATH_FUNCTION(log, __builtin_logf(x))
MATH_FUNCTION(log2, __builtin_log2f(x))
MATH_FUNCTION(log10, __builtin_log10f(x))
MATH_FUNCTION(sqrt, __builtin_sqrtf(x))
MATH_FUNCTION(rsqrt, 1.0f / __builtin_sqrtf(x))
MATH_FUNCTION(sin, __builtin_sinf(x))
MATH_FUNCTION(cos, __builtin_cosf(x))
MATH_FUNCTION(tan, __builtin_tanf(x))
MATH_FUNCTION(sinh, __builtin_sinhf(x))
MATH_FUNCTION(cosh, __builtin_coshf(x))
MATH_FUNCTION(tanh, __builtin_tanhf(x))
MATH_FUNCTION(asin, __builtin_asinf(x))
MATH_FUNCTION(acos, __builtin_acosf(x))
MATH_FUNCTION(atan, __builtin_atanf(x))
MATH_FUNCTION(floor, __builtin_floorf(x))
MATH_FUNCTION(ceil, __builtin_ceilf(x))
MATH_FUNCTION(round, __builtin_roundf(x))
MATH_FUNCTION(rint, __builtin_rintf(x))
MATH_FUNCTION(trunc, __builtin_truncf(x))
MATH_FUNCTION(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
MATH_FUNCTION(fabs, __builtin_fabsf(x))
MATH_FUNCTION(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
#undef MATH_FUNCTION
inline float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f; }

inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline float powr(float x, float y) { return __builtin_powf(x, y); }
inline float fmod(float x, float y) { return __builtin_fmodf(x, y); }
inline float atan2(float y, float x) { return __builtin_atan2f(y, x); }
inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }
inline float divide(float x, float y) { return x / y; }

#define CLASSIFICATION(name, expression)                            \
  inline bool name(float x) { return expression; }                  \
  template <class T, int N>                                         \
  inline vec<bool, N> name(vec<T, N> x) {                           \
    vec<bool, N> result;                                            \
    for (int i = 0; i < N; ++i) result[i] = name(x[i]);             \
    return result;                                                  \
  }
CLASSIFICATION(isnan, __builtin_isnan(x))
CLASSIFICATION(isinf, __builtin_isinf(x))
CLASSIFICATION(isfinite, __builtin_isfinite(x))
CLASSIFICATION(signbit, __builtin_signbit(x))
#undef CLASSIFICATION

// Both arguments of one type, as in Metal: max(1.0f, 0) does not compile. A NaN loses against a number.
template <class T, enable_if<is_scalar<T>> = 0>
constexpr T max(T a, T b) {
  if constexpr (is_floating<T>) return a != a || a < b ? b : a;
  return a < b ? b : a;
}
template <class T, enable_if<is_scalar<T>> = 0>
constexpr T min(T a, T b) {
  if constexpr (is_floating<T>) return a != a || b < a ? b : a;
  return b < a ? b : a;
}
template <class T, int N>
vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; ++i) a[i] = max(a[i], b[i]);
  return a;
}
template <class T, int N>
vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; ++i) a[i] = min(a[i], b[i]);
  return a;
}
template <class T> constexpr T max3(T a, T b, T c) { return max(a, max(b, c)); }
template <class T> constexpr T min3(T a, T b, T c) { return min(a, min(b, c)); }
template <class T> T fmax(T a, T b) { return max(a, b); }
template <class T> T fmin(T a, T b) { return min(a, b); }
template <class T> T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T, enable_if<is_scalar<T>> = 0>
T abs(T x) {
  if constexpr (is_floating<T>) return static_cast<T>(fabs(static_cast<float>(x)));
  else return x < T(0) ? static_cast<T>(-x) : x;
}
template <class T, int N>
vec<T, N> abs(vec<T, N> x) {
  for (int i = 0; i < N; ++i) x[i] = abs(x[i]);
  return x;
}

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <class F>
small_float<F> fma(small_float<F> a, small_float<F> b, small_float<F> c) {
  return small_float<F>(__builtin_fmaf(a, b, c));
}
template <class T, int N>
vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; ++i) a[i] = fma(a[i], b[i], c[i]);
  return a;
}

// b where the condition holds, a elsewhere.
template <class T, enable_if<is_scalar<T>> = 0>
T select(T a, T b, bool condition) {
  return condition ? b : a;
}
template <class T, int N>
vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> condition) {
  for (int i = 0; i < N; ++i) a[i] = condition[i] ? b[i] : a[i];
  return a;
}
template <class T> T mix(T a, T b, T weight) { return a + (b - a) * weight; }
template <class T> T step(T edge, T x) { return x < edge ? T(0) : T(1); }

template <class T, int N>
T dot(vec<T, N> a, vec<T, N> b) {
  accumulator<T> sum = 0;
  for (int i = 0; i < N; ++i) sum += static_cast<accumulator<T>>(a[i]) * static_cast<accumulator<T>>(b[i]);
  return static_cast<T>(sum);
}
template <class T, int N> T length_squared(vec<T, N> a) { return dot(a, a); }
template <class T, int N> T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <class T, int N> vec<T, N> normalize(vec<T, N> a) { return a * rsqrt(dot(a, a)); }
template <int N>
bool any(vec<bool, N> a) {
  for (int i = 0; i < N; ++i)
    if (a[i]) return true;
  return false;
}
template <int N> bool all(vec<bool, N> a) { return !any(!a); }

// Integers. Like Metal's clz and ctz, these are defined for zero.
inline uint popcount(uint x) { return static_cast<uint>(__builtin_popcount(x)); }
inline ulong popcount(ulong x) { return static_cast<ulong>(__builtin_popcountl(x)); }
inline uint clz(uint x) { return x == 0 ? 32 : static_cast<uint>(__builtin_clz(x)); }
inline int clz(int x) { return static_cast<int>(clz(static_cast<uint>(x))); }
inline ulong clz(ulong x) { return x == 0 ? 64 : static_cast<ulong>(__builtin_clzl(x)); }
inline uint ctz(uint x) { return x == 0 ? 32 : static_cast<uint>(__builtin_ctz(x)); }
inline int ctz(int x) { return static_cast<int>(ctz(static_cast<uint>(x))); }
inline ulong ctz(ulong x) { return x == 0 ? 64 : static_cast<ulong>(__builtin_ctzl(x)); }
inline uint reverse_bits(uint x) {
  uint reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline uint mulhi(uint a, uint b) { return static_cast<uint>(static_cast<uint64_t>(a) * b >> 32); }
inline uint rotate(uint x, uint turn) { return x << (turn & 31) | x >> (-turn & 31); }
template <class T> T extract_bits(T x, uint offset, uint bits) {
  return bits == 0 ? T(0) : T(x << (sizeof(T) * 8 - bits - offset)) >> (sizeof(T) * 8 - bits);
}

}  // namespace metal
