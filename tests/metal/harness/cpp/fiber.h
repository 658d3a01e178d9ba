// Fibers: a stack and a stack pointer. A switch saves the registers that a function must preserve, exchanges the
// stacks and restores; it costs a few nanoseconds, against microseconds for threads of the operating system.
#pragma once

// Saves the running fiber's stack pointer and goes on where `load` was saved.
extern "C" void fiber_switch(void** save, void* load);

// The stack pointer of a new fiber that will enter `start`, which never returns. `top` is a multiple of 16.
void* fiber_prepare(char* top, void (*start)());
