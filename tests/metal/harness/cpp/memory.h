// Memory that faults at the first byte too far: pages between two guards that nobody may touch.
#pragma once

#include "runtime.h"

namespace runtime {

struct Region {
  const char* kind;   // "buffer" or "threadgroup array"
  const char* name;
  size_t bytes;
  size_t item_bytes;
  bool writable;
  char* data;         // the first byte of the kernel's memory
  char* mapping;      // the pages and both guards
  size_t mapping_bytes;
};

Region map_region(const char* kind, const char* name, size_t bytes, size_t item_bytes, Place place);
void unmap_region(Region& region);
void protect_region(Region& region);  // from now on the kernel may only read it
bool region_holds(const Region& region, const void* address);

}  // namespace runtime
