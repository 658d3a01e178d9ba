// The schedule: which lane runs next, and when lanes that wait for each other may go on.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fiber.h"
#include "machine.h"

namespace runtime {
namespace {

// ---- Order

// One of the set bits of a non-empty mask.
int choose_bit(uint32_t mask) {
  if (machine.launch->order == kForward) return __builtin_ctz(mask);
  if (machine.launch->order == kReverse) return 31 - __builtin_clz(mask);
  const int turn = static_cast<int>(random_number() % 32);
  const uint32_t turned = mask >> turn | mask << (-turn & 31);  // rotated
  return (__builtin_ctz(turned) + turn) % 32;
}

Simdgroup* choose_simdgroup() {
  const int count = machine.simdgroup_count;
  const int first = in_random_order() ? static_cast<int>(random_number() % static_cast<uint64_t>(count)) : 0;
  for (int i = 0; i < count; ++i) {
    const int index = machine.launch->order == kReverse ? count - 1 - i : (first + i) % count;
    if (machine.simdgroups[index].ready) return &machine.simdgroups[index];
  }
  return nullptr;
}

// ---- Lanes that can never go on

bool same(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

int index_of(const Simdgroup& simdgroup) { return static_cast<int>(&simdgroup - machine.simdgroups); }

Lane* first_lane(const Simdgroup& simdgroup, uint32_t mask) {
  return &machine.lanes[index_of(simdgroup) * kSimdWidth + __builtin_ctz(mask)];
}

[[noreturn]] void explain_deadlock() {
  for (int i = 0; i < machine.simdgroup_count; ++i) {
    const Simdgroup& group = machine.simdgroups[i];
    if (group.at_collective)
      fail(first_lane(group, group.at_collective),
           "%s at %s:%d is reached by %d of %d lanes of a simdgroup (mask %08x); %d returned, %d wait at a barrier",
           group.operation, group.site.file, group.site.line, __builtin_popcount(group.at_collective),
           __builtin_popcount(group.exists), group.at_collective, __builtin_popcount(group.returned),
           __builtin_popcount(group.at_barrier));
  }
  Lane* missing = nullptr;
  for (int i = machine.simdgroup_count - 1; i >= 0; --i)
    if (uint32_t returned = machine.simdgroups[i].returned) missing = first_lane(machine.simdgroups[i], returned);
  fail(missing, "threadgroup_barrier at %s:%d is reached by %d of %d threads; the first to return without it is",
       machine.barrier_site.file, machine.barrier_site.line, machine.waiting, machine.lane_count);
}

// ---- Switching

// The lane to run next; null when every lane of the threadgroup has returned.
Lane* next_lane() {
  Simdgroup* group = machine.preferred;
  if (group == nullptr || group->ready == 0 || in_random_order()) group = choose_simdgroup();
  machine.preferred = group;
  if (group != nullptr) {
    const int lane = choose_bit(group->ready);
    group->ready &= ~(1u << lane);
    return &machine.lanes[index_of(*group) * kSimdWidth + lane];
  }
  for (int i = 0; i < machine.simdgroup_count; ++i)
    if (machine.simdgroups[i].returned != machine.simdgroups[i].exists) explain_deadlock();
  return nullptr;
}

// Lets another lane run. Returns when it is the caller's turn again.
void run_next() {
  Lane* self = machine.current;
  Lane* next = next_lane();
  if (next == self) return;
  machine.current = next;
  if (next == nullptr) {
    race::switch_to(machine.main_race_fiber);
    fiber_switch(&self->stack_pointer, machine.main_stack_pointer);
  } else {
    race::switch_to(next->race_fiber);
    fiber_switch(&self->stack_pointer, next->stack_pointer);
  }
}

}  // namespace

// ---- What the launch calls

uint64_t random_number() {  // xorshift64*
  uint64_t& state = machine.random_state;
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545F4914F6CDD1DULL >> 16;
}

void lane_start() {
  Lane* self = machine.current;
  machine.launch->entry(machine.buffer_data, self->thread);
  race::release(&machine.end_of_grid);
  self->simdgroup->returned |= self->bit;
  run_next();
  abort();  // a returned lane is never ready
}

void run_lanes() {
  machine.preferred = nullptr;
  machine.waiting = 0;
  machine.current = next_lane();
  machine.running = true;
  race::switch_to(machine.current->race_fiber);
  fiber_switch(&machine.main_stack_pointer, machine.current->stack_pointer);
  machine.running = false;
  // After a failure nothing orders the host behind the abandoned lanes.
  if (machine.launch->error[0] != 0) race::ignore_begin();
}

// ---- What kernels call

extern "C" void runtime_simd(const char* operation, Site site, const void* operand, void* result, size_t bytes,
                             Combine combine) {
  race::ignore_begin();  // lanes hand each other values here, not through memory of the kernel
  Lane* self = machine.current;
  Simdgroup& group = *self->simdgroup;
  if (group.at_collective == 0) {
    group.operation = operation;
    group.site = site;
  } else if (!same(group.site, site) || strcmp(group.operation, operation) != 0) {
    fail(self, "lanes of a simdgroup meet different collectives: %s at %s:%d and %s at %s:%d", group.operation,
         group.site.file, group.site.line, operation, site.file, site.line);
  }
  const size_t lane = static_cast<size_t>(__builtin_ctz(self->bit));
  if (bytes != 0) memcpy(group.operands + lane * bytes, operand, bytes);
  group.at_collective |= self->bit;
  if (group.at_collective == group.exists) {
    if (combine != nullptr) combine(group.operands, group.exists, group.results);
    group.ready |= group.at_collective;
    group.at_collective = 0;
  }
  run_next();
  // The next collective writes results only when every lane has come back from this one.
  if (bytes != 0) memcpy(result, group.results + lane * bytes, bytes);
  race::ignore_end();
}

extern "C" void runtime_simd_failure(int lane, const char* message, unsigned argument) {
  const Simdgroup& group = *machine.current->simdgroup;
  char text[256];
  snprintf(text, sizeof text, message, argument);
  fail(first_lane(group, 1u << lane), "%s at %s:%d %s", group.operation, group.site.file, group.site.line, text);
}

extern "C" void runtime_simdgroup_barrier(Site site, bool orders_memory) {
  Simdgroup& group = *machine.current->simdgroup;
  const unsigned turn = group.fence_turn;
  if (orders_memory) group.fence.arrive(turn);
  runtime_simd("simdgroup_barrier", site, nullptr, nullptr, 0,
               [](const void*, uint32_t, void*) { ++machine.current->simdgroup->fence_turn; });
  if (orders_memory) group.fence.leave(turn);
}

extern "C" void runtime_threadgroup_barrier(Site site, bool orders_memory) {
  Lane* self = machine.current;
  const unsigned turn = machine.fence_turn;
  if (machine.waiting == 0) machine.barrier_site = site;
  if (!same(machine.barrier_site, site))
    fail(self, "threads of a threadgroup meet different barriers: %s:%d and %s:%d", machine.barrier_site.file,
         machine.barrier_site.line, site.file, site.line);
  if (orders_memory) machine.fence.arrive(turn);
  self->simdgroup->at_barrier |= self->bit;
  if (++machine.waiting == machine.lane_count) {
    for (int i = 0; i < machine.simdgroup_count; ++i) {
      machine.simdgroups[i].ready = machine.simdgroups[i].at_barrier;
      machine.simdgroups[i].at_barrier = 0;
    }
    machine.waiting = 0;
    ++machine.fence_turn;
    machine.preferred = nullptr;
  }
  run_next();
  if (orders_memory) machine.fence.leave(turn);
}

extern "C" void runtime_atomic() {
  if (!in_random_order() || random_number() % 4 != 0) return;
  Lane* self = machine.current;
  self->simdgroup->ready |= self->bit;
  run_next();
}

}  // namespace runtime
