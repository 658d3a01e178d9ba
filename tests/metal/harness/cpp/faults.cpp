// Segmentation faults, traps and endless loops of a kernel become error messages that name the place.
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "fiber.h"
#include "machine.h"

namespace runtime {
namespace {

const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
constexpr int kSignalCount = sizeof(kSignals) / sizeof(kSignals[0]);
int timer_signal() { return SIGRTMIN + 3; }

struct Saved {
  struct sigaction actions[kSignalCount], timer_action;
  stack_t stack;
  timer_t timer;
} saved;

alignas(16) char signal_stack[1 << 16];

void* instruction_pointer(const ucontext_t* context) {
#if defined(__x86_64__)
  return reinterpret_cast<void*>(context->uc_mcontext.gregs[REG_RIP]);
#else
  return reinterpret_cast<void*>(context->uc_mcontext.pc);
#endif
}

const char* kind_of_access(const ucontext_t* context) {
#if defined(__x86_64__)
  return (context->uc_mcontext.gregs[REG_ERR] & 2) ? "write" : "read";
#else
  (void)context;
  return "access";
#endif
}

void record_instruction(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return;
  snprintf(machine.launch->fault_module, sizeof machine.launch->fault_module, "%s", info.dli_fname);
  machine.launch->fault_offset =
      static_cast<uint64_t>(static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase));
}

void explain_region(const Region& region, const char* access, const char* address) {
  const long long offset = address - region.data;
  const long long item = region.item_bytes ? static_cast<long long>(region.item_bytes) : 1;
  const long long element = offset >= 0 ? offset / item : -((-offset + item - 1) / item);
  const bool inside = offset >= 0 && offset < static_cast<long long>(region.bytes);
  fail(machine.current, "%s %s %s '%s' (%zu bytes) at byte %lld, element %lld", access,
       inside ? "in read-only" : "outside", region.kind, region.name, region.bytes, offset, element);
}

void explain_address(const char* access, const char* address) {
  for (int i = 0; i < machine.launch->buffer_count; ++i)
    if (region_holds(machine.buffers[i], address)) explain_region(machine.buffers[i], access, address);
  for (const Region& variable : machine.variables)
    if (region_holds(variable, address)) explain_region(variable, access, address);
  if (address >= machine.stacks && address < machine.stacks + kMaxThreads * machine.stack_bytes)
    fail(machine.current, "the variables of one thread need more than its stack of %zu bytes",
         machine.stack_bytes);
  fail(machine.current, "%s at address %p, which belongs to no buffer", access,
       static_cast<const void*>(address));
}

void on_fault(int signal_number, siginfo_t* info, void* context_pointer) {
  const ucontext_t* context = static_cast<ucontext_t*>(context_pointer);
  if (!machine.running) {  // not the kernel's: let it happen again without this handler
    signal(signal_number, SIG_DFL);
    return;
  }
  record_instruction(instruction_pointer(context));
  if (signal_number == SIGFPE) fail(machine.current, "integer division by zero");
  if (signal_number == SIGILL || signal_number == SIGTRAP)
    fail(machine.current, "the compiler found behaviour that is never defined");
  explain_address(kind_of_access(context), static_cast<char*>(info->si_addr));
}

void on_timer(int, siginfo_t*, void* context) {
  if (!machine.running) return;
  record_instruction(instruction_pointer(static_cast<ucontext_t*>(context)));
  fail(machine.current, "the grid did not end within %.3g seconds of processor time", machine.launch->seconds);
}

void start_timer(double seconds) {
  struct sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = timer_signal();
  event._sigev_un._tid = static_cast<pid_t>(syscall(SYS_gettid));
  struct itimerspec when = {};
  when.it_value.tv_sec = static_cast<time_t>(seconds);
  when.it_value.tv_nsec = static_cast<long>((seconds - static_cast<double>(when.it_value.tv_sec)) * 1e9);
  // Processor time of this thread: a busy machine does not make a kernel look endless.
  if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &saved.timer) != 0 ||
      timer_settime(saved.timer, 0, &when, nullptr) != 0) {
    perror("timer_create");
    abort();
  }
}

}  // namespace

void fail(const Lane* lane, const char* format, ...) {
  race::ignore_begin();
  char* error = machine.launch->error;
  const int room = sizeof machine.launch->error;
  va_list arguments;
  va_start(arguments, format);
  int used = vsnprintf(error, static_cast<size_t>(room), format, arguments);
  va_end(arguments);
  if (lane != nullptr && used >= 0 && used < room) {
    const Triple& group = lane->thread.threadgroup_position_in_grid;
    const Triple& thread = lane->thread.thread_position_in_threadgroup;
    snprintf(error + used, static_cast<size_t>(room - used), "; threadgroup (%u, %u, %u), thread (%u, %u, %u)",
             group.x, group.y, group.z, thread.x, thread.y, thread.z);
  }
  machine.running = false;
  void* abandoned;  // the stack of the lane, or of the handler, is never entered again
  race::switch_to(machine.main_race_fiber);
  fiber_switch(&abandoned, machine.main_stack_pointer);
  abort();
}

void install_fault_handlers(double seconds) {
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &saved.stack);
  struct sigaction action = {};
  // SA_NODEFER: a handler that leaves by a fiber switch never unblocks its signal.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  action.sa_sigaction = on_fault;
  for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &action, &saved.actions[i]);
  action.sa_sigaction = on_timer;
  sigaction(timer_signal(), &action, &saved.timer_action);
  start_timer(seconds);
}

void remove_fault_handlers() {
  timer_delete(saved.timer);
  for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &saved.actions[i], nullptr);
  sigaction(timer_signal(), &saved.timer_action, nullptr);
  sigaltstack(&saved.stack, nullptr);
}

}  // namespace runtime
