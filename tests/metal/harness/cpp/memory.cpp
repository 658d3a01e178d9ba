#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

namespace runtime {
namespace {

// Guards are address space, not memory: wide enough for an unsigned index below zero into an array of float4.
// ThreadSanitizer and qemu keep books of every mapped page, so there they are narrow.
#ifdef NARROW_GUARDS
constexpr size_t kGuardBytes = size_t{1} << 20;
#else
constexpr size_t kGuardBytes = size_t{1} << 36;
#endif

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

Region map_region(const char* kind, const char* name, size_t bytes, size_t item_bytes, Place place) {
  const size_t pages = round_up(bytes, page_bytes());
  const size_t total = pages + 2 * kGuardBytes;
  void* mapping = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    perror("mmap");
    abort();
  }
  char* start = static_cast<char*>(mapping) + kGuardBytes;
  if (pages != 0 && mprotect(start, pages, PROT_READ | PROT_WRITE) != 0) {
    perror("mprotect");
    abort();
  }
  // What lies between the data and the far guard reads as NaN, and as -1.
  const size_t margin = pages - bytes;
  memset(place == kAtEnd ? start : start + bytes, 0xff, margin);
  char* data = place == kAtEnd ? start + pages - bytes : start;
  return {kind, name, bytes, item_bytes, true, data, static_cast<char*>(mapping), total};
}

void unmap_region(Region& region) {
  munmap(region.mapping, region.mapping_bytes);
  region.mapping = nullptr;
}

void protect_region(Region& region) {
  region.writable = false;
  const size_t pages = region.mapping_bytes - 2 * kGuardBytes;
  if (pages != 0) mprotect(region.mapping + kGuardBytes, pages, PROT_READ);
}

bool region_holds(const Region& region, const void* address) {
  const char* byte = static_cast<const char*>(address);
  return region.mapping != nullptr && byte >= region.mapping && byte < region.mapping + region.mapping_bytes;
}

}  // namespace runtime
