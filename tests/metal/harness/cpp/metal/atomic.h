// Atomics: relaxed order only, 32-bit integers in device and threadgroup memory, float in device memory.
#pragma once

#include "../runtime.h"
#include "scalar.h"

namespace metal {

enum memory_order { memory_order_relaxed = __ATOMIC_RELAXED };

template <class T>
class atomic {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, uint> || std::is_same_v<T, float>,
                "Metal kernels of this project use atomics of int, uint and float only");

 public:
  atomic() = default;
  atomic(const atomic&) = delete;
  atomic& operator=(const atomic&) = delete;
  // Not part of Metal: where the functions below find the value.
  T* address() { return &value_; }

 private:
  T value_;
};

template <class T>
T atomic_load_explicit(const atomic<T>* object, memory_order) {
  runtime::runtime_atomic();
  T value;
  __atomic_load(const_cast<atomic<T>*>(object)->address(), &value, __ATOMIC_RELAXED);
  return value;
}
template <class T>
void atomic_store_explicit(atomic<T>* object, std::common_type_t<T> value, memory_order) {
  runtime::runtime_atomic();
  __atomic_store(object->address(), &value, __ATOMIC_RELAXED);
}
template <class T>
T atomic_exchange_explicit(atomic<T>* object, std::common_type_t<T> value, memory_order) {
  runtime::runtime_atomic();
  T old;
  __atomic_exchange(object->address(), &value, &old, __ATOMIC_RELAXED);
  return old;
}
template <class T>
bool atomic_compare_exchange_weak_explicit(atomic<T>* object, T* expected, std::common_type_t<T> desired,
                                           memory_order, memory_order) {
  runtime::runtime_atomic();
  return __atomic_compare_exchange(object->address(), expected, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

// Replaces the value by `change(value)` and returns what it was.
template <class T, class Change>
T atomic_update(atomic<T>* object, Change change) {
  runtime::runtime_atomic();
  T old, changed;
  __atomic_load(object->address(), &old, __ATOMIC_RELAXED);
  do {
    changed = change(old);
  } while (!__atomic_compare_exchange(object->address(), &old, &changed, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

#define ATOMIC_FUNCTION(name, condition, expression)                                              \
  template <class T>                                                                              \
  T atomic_fetch_##name##_explicit(atomic<T>* object, std::common_type_t<T> value, memory_order) { \
    static_assert(condition, "atomic_fetch_" #name "_explicit does not exist for this type");     \
    return atomic_update(object, [value](T old) -> T { return expression; });                     \
  }
ATOMIC_FUNCTION(add, true, old + value)
ATOMIC_FUNCTION(sub, true, old - value)
ATOMIC_FUNCTION(max, std::is_integral_v<T>, old < value ? value : old)
ATOMIC_FUNCTION(min, std::is_integral_v<T>, value < old ? value : old)
ATOMIC_FUNCTION(and, std::is_integral_v<T>, (old & value))
ATOMIC_FUNCTION(or, std::is_integral_v<T>, old | value)
ATOMIC_FUNCTION(xor, std::is_integral_v<T>, old ^ value)
#undef ATOMIC_FUNCTION

}  // namespace metal

using atomic_int = metal::atomic<int>;
using atomic_uint = metal::atomic<uint>;
using atomic_float = metal::atomic<float>;
