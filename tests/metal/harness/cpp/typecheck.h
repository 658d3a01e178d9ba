// The Metal Shading Language for a type check by clang: address spaces are real here, nothing runs. A pointer that
// loses or mixes its address space, a write to a const input, a double, an atomic that Metal lacks: all are errors.
#pragma once

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define METAL_FUNC inline

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef _Float16 half;
typedef __fp16 bfloat;  // another arithmetic type of 16 bits: only its address space and its name matter here
typedef half float16_t;
typedef bfloat bfloat16_t;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define FLT_MAX __FLT_MAX__
#define MAXFLOAT __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX half(65504.0f)
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT2_F 1.41421356237309504880f
#define MLX_MTL_CONST static constexpr constant const
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")

namespace metal {

namespace fast = ::metal;
namespace precise = ::metal;

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// `float4(a, b, c, d)` is not C++ for these vectors; typecheck.py turns it into `make<float4>(a, b, c, d)`.
template <class V, class... Arguments>
V make(Arguments...);

template <class To, class From>
To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of the same size");
  return __builtin_bit_cast(To, value);
}

// ---- Math: one type for all arguments, as in Metal

#define FUNCTIONS_OF_ONE(declare)                                                                              \
  declare(exp) declare(exp2) declare(exp10) declare(log) declare(log2) declare(log10) declare(sqrt)            \
  declare(rsqrt) declare(sin) declare(cos) declare(tan) declare(sinh) declare(cosh) declare(tanh)              \
  declare(asin) declare(acos) declare(atan) declare(floor) declare(ceil) declare(round) declare(rint)          \
  declare(trunc) declare(fract) declare(fabs) declare(saturate) declare(sign) declare(abs) declare(popcount)   \
  declare(clz) declare(ctz) declare(reverse_bits) declare(normalize)
#define DECLARE_ONE(name) template <class T> T name(T x);
FUNCTIONS_OF_ONE(DECLARE_ONE)
#undef DECLARE_ONE
#undef FUNCTIONS_OF_ONE
template <class T> T max(T a, T b);
template <class T> T min(T a, T b);
template <class T> T fmax(T a, T b);
template <class T> T fmin(T a, T b);
template <class T> T max3(T a, T b, T c);
template <class T> T min3(T a, T b, T c);
template <class T> T clamp(T x, T low, T high);
template <class T> T mix(T a, T b, T weight);
template <class T> T step(T edge, T x);
template <class T> T fma(T a, T b, T c);
template <class T> T pow(T x, T y);
template <class T> T powr(T x, T y);
template <class T> T fmod(T x, T y);
template <class T> T atan2(T y, T x);
template <class T> T copysign(T x, T y);
template <class T> T divide(T x, T y);
template <class T> T mulhi(T a, T b);
template <class T> T rotate(T x, T turn);
template <class T> T extract_bits(T x, uint offset, uint bits);
template <class T> T ldexp(T x, int k);
template <class T, class C> T select(T a, T b, C condition);
template <class T, int N> T dot(vec<T, N> a, vec<T, N> b);
float dot(vec<float, 2>, vec<float, 2>);
float dot(vec<float, 3>, vec<float, 3>);
float dot(vec<float, 4>, vec<float, 4>);
half dot(vec<half, 2>, vec<half, 2>);
half dot(vec<half, 3>, vec<half, 3>);
half dot(vec<half, 4>, vec<half, 4>);
float length(vec<float, 2>);
float length(vec<float, 3>);
float length(vec<float, 4>);
template <class V> float length_squared(V);
template <class V> bool any(V);
template <class V> bool all(V);
template <class T> bool isnan(T);
template <class T> bool isinf(T);
template <class T> bool isfinite(T);
template <class T> bool signbit(T);

template <class T>
struct numeric_limits {
  static constexpr T max() { return T(0); }
  static constexpr T min() { return T(0); }
  static constexpr T lowest() { return T(0); }
  static constexpr T epsilon() { return T(0); }
  static constexpr T infinity() { return T(0); }
  static constexpr T quiet_NaN() { return T(0); }
};

// ---- Simdgroups and barriers

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <class T> T simd_sum(T);
template <class T> T simd_product(T);
template <class T> T simd_max(T);
template <class T> T simd_min(T);
template <class T> T simd_and(T);
template <class T> T simd_or(T);
template <class T> T simd_xor(T);
template <class T> T simd_prefix_inclusive_sum(T);
template <class T> T simd_prefix_exclusive_sum(T);
template <class T> T simd_prefix_inclusive_product(T);
template <class T> T simd_prefix_exclusive_product(T);
template <class T> T simd_broadcast_first(T);
template <class T> T simd_shuffle(T, ushort lane);
template <class T> T simd_broadcast(T, ushort lane);
template <class T> T simd_shuffle_xor(T, ushort mask);
template <class T> T simd_shuffle_up(T, ushort delta);
template <class T> T simd_shuffle_down(T, ushort delta);
template <class T> T simd_shuffle_rotate_up(T, ushort delta);
template <class T> T simd_shuffle_rotate_down(T, ushort delta);
template <class T> T simd_shuffle_and_fill_up(T, T filling, ushort delta);
template <class T> T simd_shuffle_and_fill_down(T, T filling, ushort delta);
struct simd_vote {
  typedef ulong vote_t;
  explicit constexpr simd_vote(vote_t = 0) {}
  explicit constexpr operator vote_t() const { return 0; }
  constexpr bool any() const { return false; }
  constexpr bool all() const { return false; }
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();

// ---- Atomics

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value_; };
template <class T> struct same { typedef T type; };
template <class T> using value_of = typename same<T>::type;

#define ATOMIC_FUNCTIONS(space, T)                                                                             \
  T atomic_load_explicit(const space atomic<T>*, memory_order);                                                \
  void atomic_store_explicit(space atomic<T>*, T, memory_order);                                               \
  T atomic_exchange_explicit(space atomic<T>*, T, memory_order);                                               \
  bool atomic_compare_exchange_weak_explicit(space atomic<T>*, thread T*, T, memory_order, memory_order);      \
  T atomic_fetch_add_explicit(space atomic<T>*, T, memory_order);                                              \
  T atomic_fetch_sub_explicit(space atomic<T>*, T, memory_order);
#define INTEGER_ATOMIC_FUNCTIONS(space, T)                                                                     \
  ATOMIC_FUNCTIONS(space, T)                                                                                   \
  T atomic_fetch_max_explicit(space atomic<T>*, T, memory_order);                                              \
  T atomic_fetch_min_explicit(space atomic<T>*, T, memory_order);                                              \
  T atomic_fetch_and_explicit(space atomic<T>*, T, memory_order);                                              \
  T atomic_fetch_or_explicit(space atomic<T>*, T, memory_order);                                               \
  T atomic_fetch_xor_explicit(space atomic<T>*, T, memory_order);
INTEGER_ATOMIC_FUNCTIONS(device, int)
INTEGER_ATOMIC_FUNCTIONS(device, uint)
INTEGER_ATOMIC_FUNCTIONS(threadgroup, int)
INTEGER_ATOMIC_FUNCTIONS(threadgroup, uint)
ATOMIC_FUNCTIONS(device, float)  // not in threadgroup memory

// ---- Matrices

template <class T, int Columns, int Rows> struct simdgroup_matrix {
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal);
};
#define MATRIX_MEMORY(space)                                                                                   \
  template <class T>                                                                                           \
  void simdgroup_load(thread simdgroup_matrix<T, 8, 8>&, const space T*, ulong elements_per_row = 8,           \
                      vec<ulong, 2> origin = 0, bool transpose = false);                                       \
  template <class T>                                                                                           \
  void simdgroup_store(simdgroup_matrix<T, 8, 8>, space T*, ulong elements_per_row = 8,                        \
                       vec<ulong, 2> origin = 0, bool transpose = false);
MATRIX_MEMORY(device)
MATRIX_MEMORY(threadgroup)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>,
                                   simdgroup_matrix<B, 8, 8>, simdgroup_matrix<C, 8, 8>);
template <class D, class A, class B>
void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>);
template <class T, int Columns, int Rows> simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T);

}  // namespace metal

using namespace metal;

typedef metal::atomic<int> atomic_int;
typedef metal::atomic<uint> atomic_uint;
typedef metal::atomic<float> atomic_float;
typedef metal::simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef metal::simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef metal::simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

#define VECTOR_NAMES(type)             \
  typedef metal::vec<type, 2> type##2; \
  typedef metal::vec<type, 3> type##3; \
  typedef metal::vec<type, 4> type##4;
VECTOR_NAMES(float)
VECTOR_NAMES(half)
VECTOR_NAMES(bfloat)
VECTOR_NAMES(char)
VECTOR_NAMES(uchar)
VECTOR_NAMES(short)
VECTOR_NAMES(ushort)
VECTOR_NAMES(int)
VECTOR_NAMES(uint)
VECTOR_NAMES(long)
VECTOR_NAMES(ulong)
#undef VECTOR_NAMES

template <class U>
struct Limits {
  static constexpr constant U max = U(0), min = U(0), finite_max = U(0), finite_min = U(0);
};
template <class T, class U> constexpr T ceildiv(T n, U m) { return (n + m - 1) / m; }
template <class Index = int64_t>
Index elem_to_loc(Index elem, constant const int* shape, constant const int64_t* strides, int ndim);
