// What a kernel, the launcher in Python and the program in main.cpp see of the runtime.
//
// The runtime executes a compute grid on one processor core. Every Metal thread is a fiber with a stack of its
// own. Threadgroups run one after another. Inside a threadgroup a thread runs until it needs the others: at a
// collective of its simdgroup, at a threadgroup barrier, or at its end.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace runtime {

constexpr int kSimdWidth = 32;
constexpr int kMaxThreads = 1024;               // per threadgroup
constexpr int kMaxSimdgroups = kMaxThreads / kSimdWidth;
constexpr int kMaxBuffers = 31;
constexpr size_t kMaxThreadgroupBytes = 32768;
constexpr size_t kMaxSimdValueBytes = 64;

struct Triple {
  uint32_t x, y, z;
};

// The attributes of one thread, under their names in the Metal Shading Language.
struct Thread {
  Triple thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  Triple threadgroups_per_grid, threads_per_grid, threads_per_threadgroup, dispatch_threads_per_threadgroup;
  Triple grid_origin, grid_size;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, thread_index_in_quadgroup;
  uint32_t simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  uint32_t quadgroup_index_in_threadgroup, quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
  uint32_t threads_per_simdgroup, thread_execution_width;
};

// A place in the kernel's text.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// One thread's run of the kernel: the generated function that casts the buffers and passes the attributes.
using Entry = void (*)(void* const* buffers, const Thread& thread);

// Computes the results of all lanes from the operands of all lanes: two arrays with one value per lane; bit i
// of `lanes` says that lane i takes part.
using Combine = void (*)(const void* operands, uint32_t lanes, void* results);

// ---- Called by kernels, through the shim.

extern "C" {
// The calling lane's result, after all lanes of its simdgroup have arrived at the same place.
void runtime_simd(const char* operation, Site site, const void* operand, void* result, size_t bytes,
                  Combine combine);
// Fails the launch: lane `lane` of the running simdgroup did what `message` says.
[[noreturn]] void runtime_simd_failure(int lane, const char* message, unsigned argument);
void runtime_simdgroup_barrier(Site site, bool orders_memory);
void runtime_threadgroup_barrier(Site site, bool orders_memory);
// The memory of the threadgroup variable number `id`, the same for all threads of a threadgroup.
void* runtime_threadgroup_variable(int id, const char* name, size_t bytes, size_t item_bytes);
// A place where, in random order, another thread may run first.
void runtime_atomic();
}

// ---- Called by the launcher. The layout is repeated in launch.py.

enum Order : int32_t { kForward = 0, kReverse = 1, kRandom = 2 };
enum Place : int32_t { kAtEnd = 0, kAtStart = 1 };  // which end of a buffer touches its guard, to the byte

struct Buffer {
  const char* name;
  void* data;           // host memory: read before the launch, written after it if the kernel may write
  uint64_t bytes;
  uint64_t item_bytes;  // of one element, for error messages
  int32_t writable;
};

struct Launch {
  Entry entry;
  const Buffer* buffers;
  int32_t buffer_count;
  Triple grid;         // in threads
  Triple threadgroup;  // in threads; no axis longer than the grid's
  int32_t order;
  int32_t place;
  int32_t poison;      // the byte that fills fresh threadgroup memory
  uint64_t seed;       // of the random order
  double seconds;      // processor time after which a launch counts as endless
  // Results. error[0] is 0 if all went well.
  char error[2048];
  char fault_module[512];  // shared object and offset of the instruction that faulted, if one did
  uint64_t fault_offset;
};

extern "C" void runtime_launch(Launch* launch);

}  // namespace runtime
