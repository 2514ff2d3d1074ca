// Runs the CUDA sources on the CPU: force-include this file (g++ -include) and compile the .cu as C++. Blocks run in
// turn; every CUDA thread is a fiber, so a run is deterministic and a divergent barrier is an error, not a hang. Under
// ThreadSanitizer each fiber counts as a thread of its own and only what CUDA orders is ordered: barriers and
// __syncwarp publish memory, shuffles and votes do not.
#pragma once
#define FASTNLP_EMULATION 1
#include <math.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__

typedef int cudaError_t;
typedef struct EmulatedStream* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

namespace emulation {

#define UNSEEN __attribute__((noinline, no_sanitize("thread"), no_sanitize("address")))

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;

struct Barrier {
  int arrived = 0, generation = 0;
  bool any[2] = {false, false};
  char order[2] = {0, 0};  // what ThreadSanitizer sees: one clock per parity, so that only passed barriers order
};

struct Fiber {
  void* saved = nullptr;  // its stack pointer while it waits
  void* stack = nullptr;
  void* shadow = nullptr;  // ThreadSanitizer's fiber
  void* fake_stack = nullptr;
  bool done = true;
  unsigned exchanges = 0;
};

struct Machine {
  Fiber fibers[kMaxThreads];
  void* main_saved = nullptr;
  void* main_shadow = nullptr;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  int threads = 0, running = 0, current = 0;
  long idle_switches = 0;
  int64_t launches = 0;
  dim3 block, grid;
  Barrier barriers[16], warps[kMaxThreads / 32], exchanges[kMaxThreads / 32];
  uint64_t slots[kMaxThreads / 32][2][32];
  const std::function<void()>* body = nullptr;
  char block_begins = 0, block_ends = 0;  // two clocks: a thread that ends is not before one that has yet to begin
};
inline Machine machine;

// Saves the callee's registers on this stack and continues on another. (x86-64 only. swapcontext would be portable, but
// it calls the kernel for the signal mask, and a walk over a few hundred steps switches millions of times.)
extern "C" void emulation_jump(void** from, void* to);
asm(R"(
  .weak emulation_jump
  .type emulation_jump, @function
emulation_jump:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

UNSEEN inline void switch_to(Fiber* from, Fiber* to) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to ? to->shadow : machine.main_shadow, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void** save = from ? (from->done ? nullptr : &from->fake_stack) : &machine.main_fake_stack;
  __sanitizer_start_switch_fiber(save, to ? to->stack : machine.main_stack,
                                 to ? kStackBytes : machine.main_stack_bytes);
#endif
  emulation_jump(from ? &from->saved : &machine.main_saved, to ? to->saved : machine.main_saved);
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(from ? from->fake_stack : machine.main_fake_stack, &stack, &bytes);
#endif
}

UNSEEN inline void next() {
  Fiber* from = &machine.fibers[machine.current];
  if (++machine.idle_switches > 4L * kMaxThreads) {
    std::fprintf(stderr, "emulation: threads wait at different barriers\n");
    std::abort();
  }
  do machine.current = (machine.current + 1) % machine.threads;
  while (machine.fibers[machine.current].done);
  if (&machine.fibers[machine.current] != from) switch_to(from, &machine.fibers[machine.current]);
}

UNSEEN inline bool wait(Barrier* barrier, int expected, bool value, bool publishes) {
  const int generation = barrier->generation;
  const int parity = generation & 1;
#if defined(__SANITIZE_THREAD__)
  if (publishes) __tsan_release(&barrier->order[parity]);
#endif
  if (barrier->arrived == 0) barrier->any[parity] = false;
  barrier->any[parity] |= value;
  if (++barrier->arrived == expected) {
    barrier->arrived = 0;
    ++barrier->generation;
    machine.idle_switches = 0;
  } else {
    while (barrier->generation == generation) next();
  }
#if defined(__SANITIZE_THREAD__)
  if (publishes) __tsan_acquire(&barrier->order[parity]);
#endif
  return barrier->any[parity];
}

UNSEEN inline int thread() { return machine.current; }
UNSEEN inline dim3 block() { return machine.block; }
UNSEEN inline dim3 grid() { return machine.grid; }
UNSEEN inline int threads() { return machine.threads; }

UNSEEN inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&machine.block_begins);
#endif
  (*machine.body)();
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&machine.block_ends);
#endif
  Fiber* self = &machine.fibers[machine.current];
  self->done = true;
  machine.idle_switches = 0;
  if (--machine.running == 0) {
    switch_to(self, nullptr);
  } else {
    do machine.current = (machine.current + 1) % machine.threads;
    while (machine.fibers[machine.current].done);
    switch_to(self, &machine.fibers[machine.current]);
  }
}

UNSEEN inline void run_block(const std::function<void()>& body, int threads) {
#if defined(__SANITIZE_THREAD__)
  machine.main_shadow = __tsan_get_current_fiber();
  __tsan_release(&machine.block_begins);
#endif
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  void* low = nullptr;
  pthread_attr_getstack(&attributes, &low, &machine.main_stack_bytes);
  pthread_attr_destroy(&attributes);
  machine.main_stack = low;
#endif
  machine.threads = machine.running = threads;
  machine.current = 0;
  machine.idle_switches = 0;
  machine.body = &body;
  for (Barrier& barrier : machine.barriers) barrier.arrived = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (!fiber.stack) {
      fiber.stack =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
#if defined(__SANITIZE_THREAD__)
      fiber.shadow = __tsan_create_fiber(0);
#endif
    }
    fiber.done = false;
    void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kStackBytes);
    for (int slot = 1; slot <= 8; ++slot) top[-slot] = nullptr;
    top[-2] = reinterpret_cast<void*>(enter);  // where the first jump returns to
    fiber.saved = top - 8;
  }
  switch_to(nullptr, &machine.fibers[0]);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&machine.block_ends);
#endif
}

// What every lane of the warp brings, seen by all: slots alternate, so one barrier per exchange is enough.
UNSEEN inline const uint64_t* exchange(uint64_t value) {
  const int self = machine.current;
  const int warp = self / 32;
  uint64_t* slots = machine.slots[warp][machine.fibers[self].exchanges++ & 1];
  slots[self % 32] = value;
  wait(&machine.exchanges[warp], std::min(32, machine.threads - warp * 32), false, false);
  return slots;
}

UNSEEN inline uint64_t read(const uint64_t* slots, int lane) { return slots[lane]; }

template <typename T>
uint64_t pack(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <typename T>
T unpack(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

}  // namespace emulation

#define threadIdx (dim3(emulation::thread()))
#define blockIdx (emulation::block())
#define gridDim (emulation::grid())
#define blockDim (dim3(emulation::threads()))

inline void __syncthreads() { emulation::wait(&emulation::machine.barriers[0], emulation::threads(), false, true); }
inline int __syncthreads_or(int value) {
  return emulation::wait(&emulation::machine.barriers[0], emulation::threads(), value != 0, true);
}
inline void __syncwarp(unsigned = ~0u) {
  emulation::wait(&emulation::machine.warps[emulation::thread() / 32], 32, false, true);
}
inline int __any_sync(unsigned, int value) {
  const uint64_t* slots = emulation::exchange(value != 0);
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) any |= emulation::read(slots, lane) != 0;
  return any;
}
inline unsigned __ballot_sync(unsigned, int value) {
  const uint64_t* slots = emulation::exchange(value != 0);
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= unsigned(emulation::read(slots, lane)) << lane;
  return mask;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::unpack<T>(emulation::read(emulation::exchange(emulation::pack(value)), lane & 31));
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = (emulation::thread() & 31) ^ mask;
  return emulation::unpack<T>(emulation::read(emulation::exchange(emulation::pack(value)), lane));
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = emulation::thread() & 31;
  return emulation::unpack<T>(
      emulation::read(emulation::exchange(emulation::pack(value)), lane < delta ? lane : lane - delta));
}
inline int __reduce_max_sync(unsigned, int value) {
  const uint64_t* slots = emulation::exchange(emulation::pack(value));
  int top = value;
  for (int lane = 0; lane < 32; ++lane) top = std::max(top, emulation::unpack<int>(emulation::read(slots, lane)));
  return top;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __float_as_int(float x) { return emulation::unpack<int>(emulation::pack(x)); }
inline float __int_as_float(int x) { return emulation::unpack<float>(emulation::pack(x)); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __double2hiint(double x) { return int(emulation::pack(x) >> 32); }
inline double __hiloint2double(int high, int low) {
  return emulation::unpack<double>(uint64_t(uint32_t(high)) << 32 | uint32_t(low));
}

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline __half __ushort_as_half(unsigned short bits) { return emulation::unpack<__half>(bits); }
inline unsigned short __half_as_ushort(__half x) { return (unsigned short)emulation::pack(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return __int_as_float(int(uint32_t(x.bits) << 16)); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits = uint32_t(__float_as_int(x));
  if (x != x) return {0x7fff};
  bits += 0x7fff + (bits >> 16 & 1);
  return {uint16_t(bits >> 16)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

using std::max;
using std::min;

namespace fastnlp {

inline bool named_barrier_or(int id, int threads, bool value) {
  return emulation::wait(&emulation::machine.barriers[id], threads, value, true);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t, Arguments... arguments) {
  const std::function<void()> body = [&] { kernel(arguments...); };
  emulation::machine.grid = grid;
  ++emulation::machine.launches;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      emulation::machine.block = dim3(x, y);
      emulation::run_block(body, threads);
    }
  }
  return cudaSuccess;
}

}  // namespace fastnlp
