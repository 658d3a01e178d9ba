// The Metal Shading Language as C++: what generated kernels include. No headers of the C++ library beyond
// <type_traits>, because Metal's keywords below are macros and its math has the names of C's.
#pragma once

#include "metal/atomic.h"
#include "metal/math.h"
#include "metal/matrix.h"
#include "metal/mlx.h"
#include "metal/simd.h"

// The memory behind `threadgroup T name[N];`, which translate.py rewrites into a reference.
template <class Array>
Array& threadgroup_variable(int id, const char* name) {
  return *static_cast<Array*>(
      runtime::runtime_threadgroup_variable(id, name, sizeof(Array), sizeof(std::remove_all_extents_t<Array>)));
}

inline vec<uint, 3> attribute(runtime::Triple value) { return {value.x, value.y, value.z}; }
inline uint attribute(uint value) { return value; }

// Address spaces exist only for the type check: pointers of all of them are plain pointers here.
#define device
#define constant
#define thread
#define threadgroup
#define kernel
