// simdgroup_matrix: 8 x 8 values that a simdgroup holds together. Here every lane holds all 64, so the contents
// are right and the cost is not.
#pragma once

#include "simd.h"

namespace metal {

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has 8 x 8 matrices only");
  T values[8][8];
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 8; ++j) values[i][j] = i == j ? diagonal : T(0);
  }
};

// `origin` is (column, row) of the first element.
template <class T>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* source, ulong elements_per_row = 8,
                    vec<ulong, 2> origin = 0ul, bool transpose = false, Site site = Site::here()) {
  runtime::runtime_simdgroup_barrier(site, false);
  const T* first = source + origin.y * elements_per_row + origin.x;
  for (ulong i = 0; i < 8; ++i)
    for (ulong j = 0; j < 8; ++j)
      (transpose ? matrix.values[j][i] : matrix.values[i][j]) = first[i * elements_per_row + j];
}

template <class T>
void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, T* target, ulong elements_per_row = 8,
                     vec<ulong, 2> origin = 0ul, bool transpose = false, Site site = Site::here()) {
  runtime::runtime_simdgroup_barrier(site, false);
  if (!simd_is_first(site)) return;
  T* first = target + origin.y * elements_per_row + origin.x;
  for (ulong i = 0; i < 8; ++i)
    for (ulong j = 0; j < 8; ++j)
      first[i * elements_per_row + j] = transpose ? matrix.values[j][i] : matrix.values[i][j];
}

// d = a * b + c
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, Site site = Site::here()) {
  runtime::runtime_simdgroup_barrier(site, false);
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = static_cast<float>(c.values[i][j]);
      for (int k = 0; k < 8; ++k) sum += static_cast<float>(a.values[i][k]) * static_cast<float>(b.values[k][j]);
      d.values[i][j] = static_cast<D>(sum);
    }
}

template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
                        Site site = Site::here()) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<D, 8, 8>(D(0)), site);
}

template <class T, int Columns, int Rows>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> matrix;
  for (auto& row : matrix.values)
    for (T& element : row) element = value;
  return matrix;
}

}  // namespace metal

using simdgroup_float8x8 = metal::simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = metal::simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = metal::simdgroup_matrix<bfloat, 8, 8>;
