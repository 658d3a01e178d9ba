// Vectors of two, three and four elements. Swizzles: .xy .yz .zw .xyz are vectors inside the vector, .xz and .yw
// are read and written as a whole. A vector is aligned like its elements, so a misaligned load goes unnoticed.
#pragma once

#include "scalar.h"

namespace metal {

template <class T, int N>
struct vec;

// Two elements that do not lie side by side.
template <class T, int I, int J>
struct swizzle {
  T data[J + 1];
  operator vec<T, 2>() const { return {data[I], data[J]}; }
  swizzle& operator=(vec<T, 2> value) {
    data[I] = value[0];
    data[J] = value[1];
    return *this;
  }
  swizzle& operator=(const swizzle& other) { return *this = static_cast<vec<T, 2>>(other); }
};

template <class T, int N>
struct vec_elements;
template <class T>
struct vec_elements<T, 2> {
  union {
    T data[2];
    struct { T x, y; };
    struct { T r, g; };
  };
};
template <class T>
struct vec_elements<T, 3> {
  union {
    T data[4];  // a vector of three takes the room of four
    struct { T x, y, z; };
    struct { T r, g, b; };
    vec<T, 2> xy;
    struct { T before_yz; vec<T, 2> yz; };
    swizzle<T, 0, 2> xz;
  };
  vec_elements() = default;
  vec_elements(const vec_elements& other) { *this = other; }
  vec_elements& operator=(const vec_elements& other) {
    for (int i = 0; i < 3; ++i) data[i] = other.data[i];  // not the fourth: `v.xyz = u` must keep v.w
    return *this;
  }
};
template <class T>
struct vec_elements<T, 4> {
  union {
    T data[4];
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    struct { vec<T, 2> xy, zw; };
    struct { T before_yz; vec<T, 2> yz; };
    vec<T, 3> xyz;
    swizzle<T, 0, 2> xz;
    swizzle<T, 1, 3> yw;
  };
  vec_elements() = default;
  vec_elements(const vec_elements& other) { *this = other; }
  vec_elements& operator=(const vec_elements& other) {
    for (int i = 0; i < 4; ++i) data[i] = other.data[i];
    return *this;
  }
};

template <class A>
constexpr int width = 1;  // of one argument of a constructor
template <class T, int N>
constexpr int width<vec<T, N>> = N;
template <class T, int I, int J>
constexpr int width<swizzle<T, I, J>> = 2;

template <class T, int N>
struct vec : vec_elements<T, N> {
  using vec_elements<T, N>::data;

  vec() = default;
  vec(T value) {  // every element; a scalar becomes a vector by itself
    for (int i = 0; i < N; ++i) data[i] = value;
  }
  template <class A, enable_if<is_scalar<A> && !std::is_convertible_v<A, T>> = 0>
  explicit vec(A value) : vec(static_cast<T>(value)) {}
  template <class U>
  explicit vec(vec<U, N> other) {
    for (int i = 0; i < N; ++i) data[i] = static_cast<T>(other.data[i]);
  }
  template <class A, class B, class... Rest>
  vec(A a, B b, Rest... rest) {
    static_assert(width<A> + width<B> + (0 + ... + width<Rest>) == N, "wrong number of elements");
    int next = 0;
    append(next, a);
    append(next, b);
    (append(next, rest), ...);
  }

  T& operator[](int i) { return data[i]; }
  const T& operator[](int i) const { return data[i]; }

 private:
  template <class A>
  void append(int& next, A value) {
    if constexpr (is_scalar<A>) {
      data[next++] = static_cast<T>(value);
    } else if constexpr (width<A> == 2) {
      const vec<T, 2> pair(value);
      for (int i = 0; i < 2; ++i) data[next++] = pair[i];
    } else {
      for (int i = 0; i < width<A>; ++i) data[next++] = static_cast<T>(value[i]);
    }
  }
};

template <class A>
constexpr bool is_vec = false;
template <class T, int N>
constexpr bool is_vec<vec<T, N>> = true;

// A scalar joins a vector if nothing is lost on the way.
template <class A, class T>
constexpr bool joins =
    is_scalar<A> && std::is_convertible_v<A, T> && !(is_small_float<T> && std::is_floating_point_v<A>);

#define VECTOR_OPERATOR(op)                                                                                 \
  template <class T, int N>                                                                                 \
  auto operator op(vec<T, N> a, vec<T, N> b) {                                                              \
    vec<std::decay_t<decltype(VECTOR_ELEMENT(T, a[0] op b[0]))>, N> result;                                 \
    for (int i = 0; i < N; ++i) result[i] = VECTOR_ELEMENT(T, a[i] op b[i]);                                \
    return result;                                                                                          \
  }                                                                                                         \
  template <class T, int N, class A, enable_if<joins<A, T>> = 0>                                            \
  auto operator op(vec<T, N> a, A b) {                                                                      \
    return a op vec<T, N>(static_cast<T>(b));                                                               \
  }                                                                                                         \
  template <class T, int N, class A, enable_if<joins<A, T>> = 0>                                            \
  auto operator op(A a, vec<T, N> b) {                                                                      \
    return vec<T, N>(static_cast<T>(a)) op b;                                                               \
  }
#define VECTOR_ASSIGNMENT(op)                                                                               \
  template <class T, int N, class B>                                                                        \
  vec<T, N>& operator op##=(vec<T, N>& a, B b) {                                                            \
    return a = a op b;                                                                                      \
  }
#define VECTOR_ELEMENT(T, value) static_cast<T>(value)
VECTOR_OPERATOR(+)
VECTOR_OPERATOR(-)
VECTOR_OPERATOR(*)
VECTOR_OPERATOR(/)
VECTOR_OPERATOR(%)
VECTOR_OPERATOR(&)
VECTOR_OPERATOR(|)
VECTOR_OPERATOR(^)
VECTOR_OPERATOR(<<)
VECTOR_OPERATOR(>>)
VECTOR_ASSIGNMENT(+)
VECTOR_ASSIGNMENT(-)
VECTOR_ASSIGNMENT(*)
VECTOR_ASSIGNMENT(/)
VECTOR_ASSIGNMENT(&)
VECTOR_ASSIGNMENT(|)
VECTOR_ASSIGNMENT(^)
VECTOR_ASSIGNMENT(<<)
VECTOR_ASSIGNMENT(>>)
#undef VECTOR_ELEMENT
#define VECTOR_ELEMENT(T, value) static_cast<bool>(value)
VECTOR_OPERATOR(==)
VECTOR_OPERATOR(!=)
VECTOR_OPERATOR(<)
VECTOR_OPERATOR(<=)
VECTOR_OPERATOR(>)
VECTOR_OPERATOR(>=)
VECTOR_OPERATOR(&&)
VECTOR_OPERATOR(||)
#undef VECTOR_ELEMENT
#undef VECTOR_OPERATOR
#undef VECTOR_ASSIGNMENT

template <class T, int N>
vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; ++i) a[i] = -a[i];
  return a;
}
template <class T, int N>
vec<T, N> operator~(vec<T, N> a) {
  for (int i = 0; i < N; ++i) a[i] = static_cast<T>(~a[i]);
  return a;
}
template <int N>
vec<bool, N> operator!(vec<bool, N> a) {
  for (int i = 0; i < N; ++i) a[i] = !a[i];
  return a;
}

}  // namespace metal

using metal::vec;

#define VECTOR_NAMES(type)         \
  using type##2 = vec<type, 2>;    \
  using type##3 = vec<type, 3>;    \
  using type##4 = vec<type, 4>;
VECTOR_NAMES(float)
VECTOR_NAMES(half)
VECTOR_NAMES(bfloat)
VECTOR_NAMES(bool)
VECTOR_NAMES(char)
VECTOR_NAMES(uchar)
VECTOR_NAMES(short)
VECTOR_NAMES(ushort)
VECTOR_NAMES(int)
VECTOR_NAMES(uint)
VECTOR_NAMES(long)
VECTOR_NAMES(ulong)
#undef VECTOR_NAMES
