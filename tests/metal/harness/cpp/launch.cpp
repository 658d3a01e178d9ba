// A launch: the threads of the grid with their attributes, threadgroup after threadgroup, between guarded buffers.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fiber.h"
#include "machine.h"

namespace runtime {

Machine machine;

namespace {

// ---- Threads

uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
uint32_t groups(uint32_t threads, uint32_t width) { return (threads + width - 1) / width; }
uint32_t volume(Triple t) { return t.x * t.y * t.z; }

// What all threads of the threadgroup at `position` share. At the edge of the grid a threadgroup is smaller.
Thread common_attributes(Triple position) {
  const Triple grid = machine.launch->grid, full = machine.launch->threadgroup;
  const Triple size = {smaller(full.x, grid.x - position.x * full.x), smaller(full.y, grid.y - position.y * full.y),
                       smaller(full.z, grid.z - position.z * full.z)};
  Thread thread = {};
  thread.threadgroup_position_in_grid = position;
  thread.threadgroups_per_grid = {groups(grid.x, full.x), groups(grid.y, full.y), groups(grid.z, full.z)};
  thread.threads_per_grid = thread.grid_size = grid;
  thread.threads_per_threadgroup = size;
  thread.dispatch_threads_per_threadgroup = full;
  thread.simdgroups_per_threadgroup = groups(volume(size), kSimdWidth);
  thread.dispatch_simdgroups_per_threadgroup = groups(volume(full), kSimdWidth);
  thread.quadgroups_per_threadgroup = groups(volume(size), 4);
  thread.dispatch_quadgroups_per_threadgroup = groups(volume(full), 4);
  thread.threads_per_simdgroup = thread.thread_execution_width = kSimdWidth;
  return thread;
}

Thread attributes(const Thread& common, uint32_t index) {
  const Triple size = common.threads_per_threadgroup, full = machine.launch->threadgroup;
  const Triple group = common.threadgroup_position_in_grid;
  Thread thread = common;
  const Triple inside = {index % size.x, index / size.x % size.y, index / (size.x * size.y)};
  thread.thread_position_in_threadgroup = inside;
  thread.thread_position_in_grid = {group.x * full.x + inside.x, group.y * full.y + inside.y,
                                    group.z * full.z + inside.z};
  thread.thread_index_in_threadgroup = index;
  thread.thread_index_in_simdgroup = index % kSimdWidth;
  thread.simdgroup_index_in_threadgroup = index / kSimdWidth;
  thread.thread_index_in_quadgroup = index % 4;
  thread.quadgroup_index_in_threadgroup = index / 4;
  return thread;
}

void map_stacks() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  machine.stack_bytes = race::kEnabled ? size_t{1} << 18 : size_t{1} << 17;
  void* memory = mmap(nullptr, kMaxThreads * machine.stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    perror("mmap");
    abort();
  }
  machine.stacks = static_cast<char*>(memory);
  for (int i = 0; i < kMaxThreads; ++i)
    mprotect(machine.stacks + static_cast<size_t>(i) * machine.stack_bytes, page, PROT_NONE);
}

void prepare_lane(Lane& lane, const Thread& common, int index) {
  lane.thread = attributes(common, static_cast<uint32_t>(index));
  lane.simdgroup = &machine.simdgroups[index / kSimdWidth];
  lane.bit = 1u << (index % kSimdWidth);
  lane.simdgroup->exists |= lane.bit;
  lane.simdgroup->ready |= lane.bit;
  // Tops at the same place of every page would share a few sets of the cache.
  const size_t offset = static_cast<size_t>(index % 16) * 256;
  lane.stack_pointer =
      fiber_prepare(machine.stacks + (static_cast<size_t>(index) + 1) * machine.stack_bytes - offset, lane_start);
  if (race::kEnabled) {
    char name[96];
    const Triple group = common.threadgroup_position_in_grid, at = lane.thread.thread_position_in_threadgroup;
    snprintf(name, sizeof name, "threadgroup (%u, %u, %u) thread (%u, %u, %u)", group.x, group.y, group.z, at.x,
             at.y, at.z);
    lane.race_fiber = race::create_fiber(name);
  }
}

void forget_variables() {
  for (int i = 0; i < kMaxVariables; ++i) {
    machine.variable_is_fresh[i] = false;
    // ThreadSanitizer must see a new threadgroup's memory as new memory.
    if (race::kEnabled && machine.variables[i].mapping) unmap_region(machine.variables[i]);
  }
  machine.threadgroup_bytes = 0;
}

void run_threadgroup(Triple position) {
  const Thread common = common_attributes(position);
  machine.lane_count = static_cast<int>(volume(common.threads_per_threadgroup));
  machine.simdgroup_count = static_cast<int>(common.simdgroups_per_threadgroup);
  if (machine.stacks == nullptr) map_stacks();
  forget_variables();
  for (int i = 0; i < machine.simdgroup_count; ++i) {
    Simdgroup& group = machine.simdgroups[i];
    group.exists = group.ready = group.at_collective = group.at_barrier = group.returned = 0;
  }
  for (int i = 0; i < machine.lane_count; ++i) prepare_lane(machine.lanes[i], common, i);
  run_lanes();
  if (race::kEnabled && machine.launch->error[0] == 0) {
    for (int i = 0; i < machine.lane_count; ++i) race::destroy_fiber(machine.lanes[i].race_fiber);
    munmap(machine.stacks, kMaxThreads * machine.stack_bytes);
    machine.stacks = nullptr;
  }
}

void run_grid() {
  const Launch& launch = *machine.launch;
  const Triple count = {groups(launch.grid.x, launch.threadgroup.x), groups(launch.grid.y, launch.threadgroup.y),
                        groups(launch.grid.z, launch.threadgroup.z)};
  const uint32_t total = volume(count);
  uint32_t* order = static_cast<uint32_t*>(malloc(total * sizeof(uint32_t)));
  for (uint32_t i = 0; i < total; ++i) order[i] = launch.order == kReverse ? total - 1 - i : i;
  for (uint32_t i = total; in_random_order() && i > 1; --i) {  // Fisher and Yates
    const uint32_t j = static_cast<uint32_t>(random_number() % i), kept = order[i - 1];
    order[i - 1] = order[j];
    order[j] = kept;
  }
  for (uint32_t i = 0; i < total && launch.error[0] == 0; ++i)
    run_threadgroup({order[i] % count.x, order[i] / count.x % count.y, order[i] / (count.x * count.y)});
  free(order);
}

void copy_buffers_in() {
  for (int i = 0; i < machine.launch->buffer_count; ++i) {
    const Buffer& buffer = machine.launch->buffers[i];
    machine.buffers[i] = map_region("buffer", buffer.name, buffer.bytes, buffer.item_bytes,
                                    static_cast<Place>(machine.launch->place));
    memcpy(machine.buffers[i].data, buffer.data, buffer.bytes);
    if (!buffer.writable) protect_region(machine.buffers[i]);
    machine.buffer_data[i] = machine.buffers[i].data;
    if (race::kEnabled)
      fprintf(stderr, "REGION %p %zu buffer '%s'\n", static_cast<void*>(machine.buffers[i].data),
              static_cast<size_t>(buffer.bytes), buffer.name);
  }
}

void copy_buffers_out() {
  race::acquire(&machine.end_of_grid);
  for (int i = 0; i < machine.launch->buffer_count; ++i) {
    const Buffer& buffer = machine.launch->buffers[i];
    if (buffer.writable) memcpy(buffer.data, machine.buffers[i].data, buffer.bytes);
    unmap_region(machine.buffers[i]);
  }
  for (Region& variable : machine.variables)
    if (variable.mapping != nullptr) unmap_region(variable);
}

}  // namespace

extern "C" void runtime_launch(Launch* launch) {
  machine.launch = launch;
  machine.random_state = launch->seed * 2 + 1;
  launch->error[0] = launch->fault_module[0] = 0;
  machine.main_race_fiber = race::current_fiber();
  copy_buffers_in();
  install_fault_handlers(launch->seconds);
  run_grid();
  remove_fault_handlers();
  copy_buffers_out();
}

extern "C" void* runtime_threadgroup_variable(int id, const char* name, size_t bytes, size_t item_bytes) {
  if (id >= kMaxVariables) fail(machine.current, "more than %d threadgroup variables", kMaxVariables);
  Region& region = machine.variables[id];
  if (machine.variable_is_fresh[id]) return region.data;
  machine.threadgroup_bytes += (bytes + 15) / 16 * 16;
  if (machine.threadgroup_bytes > kMaxThreadgroupBytes)
    fail(machine.current,
         "threadgroup memory size (%zu) exceeds the maximum threadgroup memory allowed (%zu) with '%s'",
         machine.threadgroup_bytes, kMaxThreadgroupBytes, name);
  if (region.mapping == nullptr)
    region = map_region("threadgroup array", name, bytes, item_bytes, static_cast<Place>(machine.launch->place));
  race::ignore_begin();  // done on behalf of all threads, before any of them can know the address
  memset(region.data, machine.launch->poison, bytes);
  race::ignore_end();
  machine.variable_is_fresh[id] = true;
  if (race::kEnabled) {
    const Triple at = machine.current->thread.threadgroup_position_in_grid;
    fprintf(stderr, "REGION %p %zu threadgroup array '%s' of threadgroup (%u, %u, %u)\n",
            static_cast<void*>(region.data), bytes, name, at.x, at.y, at.z);
  }
  return region.data;
}

}  // namespace runtime
