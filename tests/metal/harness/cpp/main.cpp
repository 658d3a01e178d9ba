// A program around one launch, for the race detector and for foreign processors: `program <folder>`.
//
// The folder holds `call.txt` (below) and one file `<i>.bin` with the bytes of each buffer; the writable ones are
// written back. Exit status 0, or 1 with the error on standard output.
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "runtime.h"

extern "C" void kernel_entry(void* const* buffers, const runtime::Thread& thread);

namespace {

struct Named : runtime::Buffer {
  char storage[256];
};

[[noreturn]] void give_up(const char* what) {
  perror(what);
  exit(2);
}

void transfer(const char* folder, int index, const runtime::Buffer& buffer, bool write) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%d.bin", folder, index);
  FILE* file = fopen(path, write ? "wb" : "rb");
  if (file == nullptr) give_up(path);
  const size_t done =
      write ? fwrite(buffer.data, 1, buffer.bytes, file) : fread(buffer.data, 1, buffer.bytes, file);
  if (done != buffer.bytes || fclose(file) != 0) give_up(path);
}

bool read_triple(FILE* file, const char* format, runtime::Triple& triple) {
  return fscanf(file, format, &triple.x, &triple.y, &triple.z) == 3;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const char* folder = arguments[1];
  char path[4096];
  snprintf(path, sizeof path, "%s/call.txt", folder);
  FILE* file = fopen(path, "r");
  if (file == nullptr) give_up(path);

  static runtime::Launch launch;
  static Named named[runtime::kMaxBuffers];
  static runtime::Buffer buffers[runtime::kMaxBuffers];
  launch.entry = kernel_entry;
  launch.seconds = 1e6;
  unsigned long seed;
  if (!read_triple(file, "grid %u %u %u\n", launch.grid) ||
      !read_triple(file, "threadgroup %u %u %u\n", launch.threadgroup) ||
      fscanf(file, "order %d\nplace %d\npoison %d\nseed %lu\nbuffers %d\n", &launch.order, &launch.place,
             &launch.poison, &seed, &launch.buffer_count) != 5 ||
      launch.buffer_count > runtime::kMaxBuffers)
    give_up("call.txt");
  launch.seed = seed;
  for (int i = 0; i < launch.buffer_count; ++i) {
    unsigned long bytes, item_bytes;
    if (fscanf(file, "%255s %lu %lu %d\n", named[i].storage, &bytes, &item_bytes, &named[i].writable) != 4)
      give_up("call.txt");
    buffers[i] = {named[i].storage, malloc(bytes + 1), bytes, item_bytes, named[i].writable};
    transfer(folder, i, buffers[i], false);
  }
  launch.buffers = buffers;
  runtime::runtime_launch(&launch);
  if (launch.error[0] != 0) {
    printf("%s\n", launch.error);
    fflush(stdout);
    _exit(1);  // not by way of ThreadSanitizer, which would mourn the abandoned lanes
  }
  for (int i = 0; i < launch.buffer_count; ++i)
    if (buffers[i].writable) transfer(folder, i, buffers[i], true);
  return 0;
}
