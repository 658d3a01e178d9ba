// Simdgroup functions and barriers. All lanes of a simdgroup meet at the same place of the text; the last to arrive
// combines the operands in the order of the lanes. A GPU may sum in another order: compare with tolerances.
#pragma once

#include "../runtime.h"
#include "math.h"

namespace metal {

using runtime::Site;

// ---- Barriers

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}
inline void threadgroup_barrier(mem_flags flags, Site site = Site::here()) {
  runtime::runtime_threadgroup_barrier(site, flags != mem_flags::mem_none);
}
inline void simdgroup_barrier(mem_flags flags, Site site = Site::here()) {
  runtime::runtime_simdgroup_barrier(site, flags != mem_flags::mem_none);
}

// ---- The meeting

// `Operation::apply(const T* operands, uint32_t lanes, T* results)` runs once for all lanes.
template <class Operation, class T>
T meet(const char* name, Site site, T operand) {
  static_assert(sizeof(T) <= runtime::kMaxSimdValueBytes, "too large a value for a simdgroup function");
  T result;
  runtime::runtime_simd(name, site, &operand, &result, sizeof(T),
                        [](const void* operands, uint32_t lanes, void* results) {
                          Operation::apply(static_cast<const T*>(operands), lanes, static_cast<T*>(results));
                        });
  return result;
}

template <class Visit>
inline void for_each_lane(uint32_t lanes, Visit visit) {
  for (; lanes != 0; lanes &= lanes - 1) visit(__builtin_ctz(lanes));
}

// ---- Reductions and scans

template <class T> struct widened { using type = accumulator<T>; };
template <class T, int N> struct widened<vec<T, N>> { using type = vec<accumulator<T>, N>; };
template <class T> using wide = typename widened<T>::type;

struct Add { template <class T> static T of(T a, T b) { return a + b; } };
struct Multiply { template <class T> static T of(T a, T b) { return a * b; } };
struct Max { template <class T> static T of(T a, T b) { return max(a, b); } };
struct Min { template <class T> static T of(T a, T b) { return min(a, b); } };
struct And { template <class T> static T of(T a, T b) { return a & b; } };
struct Or { template <class T> static T of(T a, T b) { return a | b; } };
struct Xor { template <class T> static T of(T a, T b) { return a ^ b; } };

template <class Function>
struct Reduce {
  template <class T>
  static void apply(const T* operands, uint32_t lanes, T* results) {
    auto total = static_cast<wide<T>>(operands[__builtin_ctz(lanes)]);
    for_each_lane(lanes & (lanes - 1),
                  [&](int i) { total = Function::of(total, static_cast<wide<T>>(operands[i])); });
    for_each_lane(lanes, [&](int i) { results[i] = static_cast<T>(total); });
  }
};

template <class Function, bool inclusive, int neutral>
struct Scan {
  template <class T>
  static void apply(const T* operands, uint32_t lanes, T* results) {
    wide<T> total(neutral);
    for_each_lane(lanes, [&](int i) {
      const wide<T> next = Function::of(total, static_cast<wide<T>>(operands[i]));
      results[i] = static_cast<T>(inclusive ? next : total);
      total = next;
    });
  }
};

#define SIMD_FUNCTION(name, operation)                        \
  template <class T>                                          \
  T name(T value, Site site = Site::here()) {                 \
    return meet<operation>(#name, site, value);               \
  }
#define COMMA ,
SIMD_FUNCTION(simd_sum, Reduce<Add>)
SIMD_FUNCTION(simd_product, Reduce<Multiply>)
SIMD_FUNCTION(simd_max, Reduce<Max>)
SIMD_FUNCTION(simd_min, Reduce<Min>)
SIMD_FUNCTION(simd_and, Reduce<And>)
SIMD_FUNCTION(simd_or, Reduce<Or>)
SIMD_FUNCTION(simd_xor, Reduce<Xor>)
SIMD_FUNCTION(simd_prefix_inclusive_sum, Scan<Add COMMA true COMMA 0>)
SIMD_FUNCTION(simd_prefix_exclusive_sum, Scan<Add COMMA false COMMA 0>)
SIMD_FUNCTION(simd_prefix_inclusive_product, Scan<Multiply COMMA true COMMA 1>)
SIMD_FUNCTION(simd_prefix_exclusive_product, Scan<Multiply COMMA false COMMA 1>)
#undef SIMD_FUNCTION
#undef COMMA

// ---- Exchanges

template <class T>
struct Parcel {
  T value, filling;
  uint argument;
};

// `Source::of(lane, argument)` is the lane to read from, or a negative number for the lane's own filling.
template <class Source, bool uniform>
struct Exchange {
  template <class P>
  static void apply(const P* operands, uint32_t lanes, P* results) {
    const uint first = operands[__builtin_ctz(lanes)].argument;
    for_each_lane(lanes, [&](int i) {
      const uint argument = operands[i].argument;
      if (uniform && argument != first)
        runtime::runtime_simd_failure(i, "has another argument (%u) than the first lane", argument);
      const int source = Source::of(i, argument);
      if (source >= runtime::kSimdWidth || (source >= 0 && !(lanes >> source & 1)))
        runtime::runtime_simd_failure(i, "reads from lane %u, which does not exist", static_cast<unsigned>(source));
      results[i].value = source < 0 ? operands[i].filling : operands[source].value;
    });
  }
};

// Lanes for which up and down have no source keep their own value (or the filling's, in the _and_fill_ forms).
struct FromLane { static int of(int, uint lane) { return lane < 1000 ? static_cast<int>(lane) : 1000; } };
struct FromXor { static int of(int lane, uint mask) { return FromLane::of(0, static_cast<uint>(lane) ^ mask); } };
struct FromUp { static int of(int lane, uint delta) { return lane - static_cast<int>(delta & 63); } };
struct FromDown {
  static int of(int lane, uint delta) {
    const int source = lane + static_cast<int>(delta & 63);
    return source < runtime::kSimdWidth ? source : -1;
  }
};
struct FromRotatedUp {
  static int of(int lane, uint delta) { return (lane + 32 - static_cast<int>(delta % 32)) % 32; }
};
struct FromRotatedDown {
  static int of(int lane, uint delta) { return (lane + static_cast<int>(delta % 32)) % 32; }
};

#define EXCHANGE_FUNCTION(name, source, uniform)                                                              \
  template <class T>                                                                                          \
  T name(T value, uint argument, Site site = Site::here()) {                                                  \
    return meet<Exchange<source, uniform>>(#name, site, Parcel<T>{value, value, argument}).value;             \
  }
EXCHANGE_FUNCTION(simd_shuffle, FromLane, false)
EXCHANGE_FUNCTION(simd_broadcast, FromLane, true)
EXCHANGE_FUNCTION(simd_shuffle_xor, FromXor, true)
EXCHANGE_FUNCTION(simd_shuffle_up, FromUp, true)
EXCHANGE_FUNCTION(simd_shuffle_down, FromDown, true)
EXCHANGE_FUNCTION(simd_shuffle_rotate_up, FromRotatedUp, true)
EXCHANGE_FUNCTION(simd_shuffle_rotate_down, FromRotatedDown, true)
#undef EXCHANGE_FUNCTION
template <class T>
T simd_shuffle_and_fill_up(T value, T filling, uint delta, Site site = Site::here()) {
  // The filling comes from the upper lanes of the second operand.
  const T wrapped = meet<Exchange<FromRotatedUp, true>>("simd_shuffle_and_fill_up", site,
                                                        Parcel<T>{filling, filling, delta}).value;
  return meet<Exchange<FromUp, true>>("simd_shuffle_and_fill_up", site, Parcel<T>{value, wrapped, delta}).value;
}
template <class T>
T simd_shuffle_and_fill_down(T value, T filling, uint delta, Site site = Site::here()) {
  const T wrapped = meet<Exchange<FromRotatedDown, true>>("simd_shuffle_and_fill_down", site,
                                                          Parcel<T>{filling, filling, delta}).value;
  return meet<Exchange<FromDown, true>>("simd_shuffle_and_fill_down", site, Parcel<T>{value, wrapped, delta}).value;
}
template <class T>
T simd_broadcast_first(T value, Site site = Site::here()) {
  return meet<Exchange<FromLane, true>>("simd_broadcast_first", site, Parcel<T>{value, value, 0}).value;
}

// ---- Votes

class simd_vote {
 public:
  using vote_t = ulong;
  explicit constexpr simd_vote(vote_t lanes = 0) : lanes_(lanes) {}
  explicit constexpr operator vote_t() const { return lanes_; }
  constexpr bool any() const { return lanes_ != 0; }
  constexpr bool all() const { return lanes_ == 0xffffffff; }

 private:
  vote_t lanes_;
};

struct Ballot {
  static void apply(const uint* operands, uint32_t lanes, uint* results) {
    uint vote = 0;
    for_each_lane(lanes, [&](int i) { vote |= operands[i] << i; });
    for_each_lane(lanes, [&](int i) { results[i] = vote; });
  }
};
inline simd_vote simd_ballot(bool yes, Site site = Site::here()) {
  return simd_vote(meet<Ballot>("simd_ballot", site, yes ? 1u : 0u));
}
inline simd_vote simd_active_threads_mask(Site site = Site::here()) {
  return simd_vote(meet<Ballot>("simd_active_threads_mask", site, 1u));
}
inline bool simd_any(bool yes, Site site = Site::here()) {
  return meet<Ballot>("simd_any", site, yes ? 1u : 0u) != 0;
}
inline bool simd_all(bool yes, Site site = Site::here()) {
  return meet<Ballot>("simd_all", site, yes ? 0u : 1u) == 0;
}
struct LowestLane {
  static void apply(const uint*, uint32_t lanes, uint* results) {
    for_each_lane(lanes, [&](int i) { results[i] = i == __builtin_ctz(lanes); });
  }
};
inline bool simd_is_first(Site site = Site::here()) { return meet<LowestLane>("simd_is_first", site, 0u) != 0; }

}  // namespace metal
