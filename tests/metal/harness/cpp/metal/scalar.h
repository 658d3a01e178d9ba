// The scalar types of the Metal Shading Language: half and bfloat as 16 bits with arithmetic in float.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <type_traits>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

namespace metal {

template <bool condition>
using enable_if = std::enable_if_t<condition, int>;

// The same bits as another type of the same size.
template <class To, class From>
constexpr To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of the same size");
  return __builtin_bit_cast(To, value);
}

// IEEE 754 binary16. Metal converts float to half implicitly.
struct HalfFormat {
  static constexpr bool kImplicitFromFloat = true;
  static constexpr uint16_t kInfinity = 0x7c00, kMax = 0x7bff, kMin = 0x0400, kEpsilon = 0x1400, kNaN = 0x7e00;

  static constexpr uint16_t encode(float value) {
    const uint32_t bits = as_type<uint32_t>(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size >= 0x47800000) return static_cast<uint16_t>(sign | (size > 0x7f800000 ? kNaN : kInfinity));
    if (size < 0x38800000)  // subnormal: let the addition of 0.5 round to multiples of 2^-24
      return static_cast<uint16_t>(sign | (as_type<uint32_t>(as_type<float>(size) + 0.5f) - 0x3f000000));
    return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
  }

  static constexpr float decode(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = half & 0x7c00u, rest = (half & 0x7fffu) << 13;
    if (exponent == 0x7c00) return as_type<float>(sign | (rest + 0x70000000));
    if (exponent != 0) return as_type<float>(sign | (rest + 0x38000000));
    return as_type<float>(sign | as_type<uint32_t>(as_type<float>(rest + 0x38800000) - as_type<float>(0x38800000u)));
  }
};

// The upper half of a float. Metal converts float to bfloat only when told to.
struct BfloatFormat {
  static constexpr bool kImplicitFromFloat = false;
  static constexpr uint16_t kInfinity = 0x7f80, kMax = 0x7f7f, kMin = 0x0080, kEpsilon = 0x3c00, kNaN = 0x7fc0;

  static constexpr uint16_t encode(float value) {
    const uint32_t bits = as_type<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  static constexpr float decode(uint16_t bfloat) { return as_type<float>(static_cast<uint32_t>(bfloat) << 16); }
};

template <class Format>
struct small_float {
  uint16_t bits;

  small_float() = default;
  template <class A, enable_if<std::is_arithmetic_v<A> && Format::kImplicitFromFloat> = 0>
  constexpr small_float(A value) : bits(Format::encode(static_cast<float>(value))) {}
  template <class A, enable_if<std::is_arithmetic_v<A> && !Format::kImplicitFromFloat> = 0, class = void>
  explicit constexpr small_float(A value) : bits(Format::encode(static_cast<float>(value))) {}
  template <class Other>
  explicit constexpr small_float(small_float<Other> other) : bits(Format::encode(static_cast<float>(other))) {}

  constexpr operator float() const { return Format::decode(bits); }
  constexpr small_float operator-() const { return from_bits(static_cast<uint16_t>(bits ^ 0x8000)); }
  constexpr small_float operator+() const { return *this; }

  static constexpr small_float from_bits(uint16_t bits) {
    small_float value{};
    value.bits = bits;
    return value;
  }
};

template <class T>
constexpr bool is_small_float = false;
template <class Format>
constexpr bool is_small_float<small_float<Format>> = true;
template <class T>
constexpr bool is_scalar = std::is_arithmetic_v<T> || is_small_float<T>;
template <class T>
constexpr bool is_floating = std::is_floating_point_v<T> || is_small_float<T>;

// What sums are kept in.
template <class T>
using accumulator = std::conditional_t<is_small_float<T>, float, T>;

// half op half is half, half op int is half, half op float is float.
template <class Format, class A>
using with_small_float = std::conditional_t<std::is_floating_point_v<A>, A, small_float<Format>>;

#define SMALL_FLOAT_OPERATOR(op)                                                                            \
  template <class F>                                                                                        \
  constexpr small_float<F> operator op(small_float<F> a, small_float<F> b) {                                \
    return small_float<F>(static_cast<float>(a) op static_cast<float>(b));                                  \
  }                                                                                                         \
  template <class F, class A, enable_if<std::is_arithmetic_v<A>> = 0>                                       \
  constexpr with_small_float<F, A> operator op(small_float<F> a, A b) {                                     \
    return with_small_float<F, A>(static_cast<float>(a) op static_cast<float>(b));                          \
  }                                                                                                         \
  template <class F, class A, enable_if<std::is_arithmetic_v<A>> = 0>                                       \
  constexpr with_small_float<F, A> operator op(A a, small_float<F> b) {                                     \
    return with_small_float<F, A>(static_cast<float>(a) op static_cast<float>(b));                          \
  }                                                                                                         \
  template <class F, class A, enable_if<is_scalar<A>> = 0>                                                  \
  constexpr small_float<F>& operator op##=(small_float<F>& a, A b) {                                        \
    return a = a op b; /* bfloat op= float does not compile, as bfloat = float does not */                  \
  }
SMALL_FLOAT_OPERATOR(+)
SMALL_FLOAT_OPERATOR(-)
SMALL_FLOAT_OPERATOR(*)
SMALL_FLOAT_OPERATOR(/)
#undef SMALL_FLOAT_OPERATOR

template <class T>
struct numeric_limits {  // integers
  static constexpr T max() { return static_cast<T>(std::is_signed_v<T> ? static_cast<T>(~T(0) ^ lowest()) : ~T(0)); }
  static constexpr T min() { return lowest(); }
  static constexpr T lowest() { return static_cast<T>(std::is_signed_v<T> ? T(1) << (sizeof(T) * 8 - 1) : T(0)); }
};
template <>
struct numeric_limits<float> {
  static constexpr float max() { return __FLT_MAX__; }
  static constexpr float min() { return __FLT_MIN__; }
  static constexpr float lowest() { return -__FLT_MAX__; }
  static constexpr float epsilon() { return __FLT_EPSILON__; }
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
};
template <class F>
struct numeric_limits<small_float<F>> {
  static constexpr small_float<F> max() { return small_float<F>::from_bits(F::kMax); }
  static constexpr small_float<F> min() { return small_float<F>::from_bits(F::kMin); }
  static constexpr small_float<F> lowest() { return -max(); }
  static constexpr small_float<F> epsilon() { return small_float<F>::from_bits(F::kEpsilon); }
  static constexpr small_float<F> infinity() { return small_float<F>::from_bits(F::kInfinity); }
  static constexpr small_float<F> quiet_NaN() { return small_float<F>::from_bits(F::kNaN); }
};

}  // namespace metal

using half = metal::small_float<metal::HalfFormat>;
using bfloat = metal::small_float<metal::BfloatFormat>;
using metal::as_type;

constexpr half operator""h(long double value) { return half(static_cast<float>(value)); }

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define FLT_MAX __FLT_MAX__
#define MAXFLOAT __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX half::from_bits(0x7bff)
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT2_F 1.41421356237309504880f
