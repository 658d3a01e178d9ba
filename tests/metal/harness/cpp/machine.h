// The state of the launch that runs now. One at a time: the runtime is not for several threads of Python.
#pragma once

#include "memory.h"
#include "race.h"
#include "runtime.h"

namespace runtime {

struct Simdgroup;

struct Lane {
  void* stack_pointer;
  void* race_fiber;
  Simdgroup* simdgroup;
  uint32_t bit;  // of its place in the simdgroup
  Thread thread;
};

// Every existing lane is in exactly one of the four sets, or is the running one.
struct Simdgroup {
  uint32_t exists;
  uint32_t ready, at_collective, at_barrier, returned;
  const char* operation;  // the collective that lanes wait at
  Site site;
  unsigned fence_turn;
  race::Fence fence;
  alignas(64) char operands[kSimdWidth * kMaxSimdValueBytes];
  alignas(64) char results[kSimdWidth * kMaxSimdValueBytes];
};

constexpr int kMaxVariables = 64;

struct Machine {
  Launch* launch;
  void* main_stack_pointer;
  void* main_race_fiber;
  bool running;           // lanes run, so faults belong to the kernel

  Lane lanes[kMaxThreads];
  int lane_count;
  Lane* current;
  Simdgroup simdgroups[kMaxSimdgroups];
  int simdgroup_count;
  Simdgroup* preferred;   // goes on while it has ready lanes; null lets the order decide

  int waiting;            // lanes at the threadgroup barrier
  Site barrier_site;
  unsigned fence_turn;
  race::Fence fence;
  char end_of_grid;       // what all threads release and only the host acquires

  Region buffers[kMaxBuffers];
  void* buffer_data[kMaxBuffers];
  Region variables[kMaxVariables];
  bool variable_is_fresh[kMaxVariables];
  size_t threadgroup_bytes;

  char* stacks;           // kMaxThreads stacks, each above a guard page
  size_t stack_bytes;
  uint64_t random_state;
};

extern Machine machine;

// schedule.cpp: runs the prepared lanes of one threadgroup until all have returned.
void run_lanes();
void lane_start();         // where the fiber of a lane begins
uint64_t random_number();
inline bool in_random_order() { return machine.launch->order == kRandom; }

// Ends the launch with a message, from a lane or from a signal handler. `lane` is the thread to name.
[[noreturn]] void fail(const Lane* lane, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Between these two, faults of the processor inside a lane end the launch, too.
void install_fault_handlers(double seconds);
void remove_fault_handlers();

}  // namespace runtime
