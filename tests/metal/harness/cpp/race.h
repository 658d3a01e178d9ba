// ThreadSanitizer's view of the grid: every Metal thread is one of its fibers. Without RACE_CHECK all of this is
// nothing. The runtime itself is compiled without instrumentation; only kernels are watched.
#pragma once

#ifdef RACE_CHECK
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif

namespace race {

#ifdef RACE_CHECK
constexpr bool kEnabled = true;
inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void* create_fiber(const char* name) {
  void* fiber = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fiber, name);
  return fiber;
}
inline void destroy_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
// 1: a switch alone orders nothing between two threads of the grid.
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
inline void acquire(void* address) { __tsan_acquire(address); }
inline void release(void* address) { __tsan_release(address); }
inline void ignore_begin() { __tsan_ignore_thread_begin(); }
inline void ignore_end() { __tsan_ignore_thread_end(); }
#else
constexpr bool kEnabled = false;
inline void* current_fiber() { return nullptr; }
inline void* create_fiber(const char*) { return nullptr; }
inline void destroy_fiber(void*) {}
inline void switch_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}
inline void ignore_begin() {}
inline void ignore_end() {}
#endif

// Orders what came before a barrier ahead of what follows it. Two objects take turns: with one, a thread that is
// already at barrier n+1 would release into the object that a late thread still has to acquire for barrier n,
// and a missing barrier between a read and the next write would go unseen.
class Fence {
 public:
  void arrive(unsigned turn) { release(&objects_[turn % 2]); }
  void leave(unsigned turn) { acquire(&objects_[turn % 2]); }

 private:
  char objects_[2];
};

}  // namespace race
