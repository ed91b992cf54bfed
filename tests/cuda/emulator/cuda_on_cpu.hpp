// CUDA C on the CPU, for tests: the kernels' own .cu is compiled unchanged by g++ behind this header.
//
// A block runs at a time. Each CUDA thread is a fiber with a stack of its own (or, with -DREAL_THREADS and the
// thread sanitizer, an operating-system thread); barriers, warp shuffles and votes switch between them. The order
// in which threads run is an argument of the launch, so that a result that depends on it shows.
//
// Reported: divergent and deadlocked barriers, wrong shuffle masks, impossible launches, shared memory that is
// read before it is written (poisoned), and, through g++'s sanitizers, accesses out of bounds and data races.
// Not modelled: occupancy, weak memory order, alignment faults, asynchronous errors, the last bits of expf, logf
// and the like (their fast-math forms are refused), tensor cores, speed.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef REAL_THREADS
#include <barrier>
#include <thread>
#else
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#endif

struct dim3 { unsigned x = 1, y = 1, z = 1; };

#define __global__
#define __device__ static
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block at a time, so a block's shared memory can be static: in a section of its own, to be poisoned at once.
#define __shared__ static __attribute__((section("shared_memory")))
extern "C" char __start_shared_memory[] __attribute__((weak)), __stop_shared_memory[] __attribute__((weak));

namespace emulator {
constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10, SHARED_BYTES = 48 << 10;  // what every device has without being asked
constexpr unsigned char POISON = 0xFF;                              // as a float: NaN; as an int: -1

enum class Wait { no, block, warp };

struct Thread {
  dim3 index;
  unsigned lane, warp;
  Wait wait = Wait::no;
  bool done = false;
  unsigned generation = 0, parity = 0, matrix_parity = 0;
  int line = 0;  // of the barrier it waits at
#ifndef REAL_THREADS
  void* stack_pointer = nullptr;
#endif
};

struct Warp {
  std::atomic<unsigned> arrived{0};
  unsigned lanes = WARP;
  uint64_t slot[2][WARP];
  std::array<unsigned, 6> fragment[2][WARP];
#ifdef REAL_THREADS
  std::unique_ptr<std::barrier<>> barrier;
#endif
};

struct Block {
  dim3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned arrived = 0, generation = 0, alive = 0;
  std::vector<unsigned char> dynamic;
  std::string error;
  const std::function<void()>* kernel = nullptr;
#ifdef REAL_THREADS
  std::unique_ptr<std::barrier<>> barrier;
#else
  void* scheduler = nullptr;
#endif
};

inline thread_local Block* block = nullptr;
inline thread_local Thread* self = nullptr;
inline std::string last_error;

#ifndef REAL_THREADS
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");

inline void yield() {
  Thread* me = self;
  emulator_switch(&me->stack_pointer, block->scheduler);
  self = me;
}

inline bool ready(const Thread& t) {
  if (t.wait == Wait::block) return block->generation != t.generation;
  if (t.wait == Wait::warp) return !(block->warps[t.warp].arrived >> t.lane & 1);
  return true;
}

inline void release_block() { block->arrived = 0; ++block->generation; }

inline void block_barrier(int line) {
  Thread& me = *self;
  for (const Thread& t : block->threads)
    if (t.wait == Wait::block && t.generation == block->generation && t.line != line)
      block->error = "threads wait at different __syncthreads, lines " + std::to_string(t.line) + " and " + std::to_string(line);
  if (++block->arrived == block->alive) return release_block();
  me.wait = Wait::block, me.generation = block->generation, me.line = line;
  yield();
  me.wait = Wait::no;
}

inline void warp_barrier(unsigned mask) {
  Thread& me = *self;
  Warp& warp = block->warps[me.warp];
  if (!(mask >> me.lane & 1)) block->error = "a lane calls a *_sync with a mask that lacks it";
  if (warp.lanes < WARP) mask &= (1u << warp.lanes) - 1;
  warp.arrived |= 1u << me.lane;
  if ((warp.arrived & mask) == mask) { warp.arrived &= ~mask; return; }
  me.wait = Wait::warp;
  yield();
  me.wait = Wait::no;
}

extern "C" inline void emulator_thread() {
  (*block->kernel)();
  self->done = true;
  --block->alive;
  if (block->alive && block->arrived == block->alive) release_block();
  void* dead;
  emulator_switch(&dead, block->scheduler);
}

inline void run_threads(const std::vector<unsigned>& order) {
  static thread_local std::vector<char> stacks;
  if (stacks.size() < STACK_BYTES * order.size()) stacks = std::vector<char>(STACK_BYTES * order.size());
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stacks.data(), stacks.size());  // of fibers that ended without returning
#endif
  for (size_t i = 0; i < order.size(); ++i) {
    auto top = reinterpret_cast<uintptr_t>(stacks.data() + STACK_BYTES * (i + 1)) & ~uintptr_t{15};
    void** frame = reinterpret_cast<void**>(top - 64);  // six registers, the entry, a return address never used
    std::fill(frame, frame + 8, nullptr);
    frame[6] = reinterpret_cast<void*>(&emulator_thread);
    block->threads[i].stack_pointer = frame;
  }
  while (block->alive && block->error.empty()) {
    bool moved = false;
    for (unsigned i : order) {
      Thread& t = block->threads[i];
      if (t.done || !ready(t)) continue;
      self = &t;
      emulator_switch(&block->scheduler, t.stack_pointer);
      moved = true;
    }
    if (moved) continue;
    auto waiting = [](Wait w) {
      return std::to_string(std::count_if(block->threads.begin(), block->threads.end(),
                                          [w](const Thread& t) { return !t.done && t.wait == w; }));
    };
    block->error = "deadlock: " + waiting(Wait::block) + " threads at __syncthreads, " + waiting(Wait::warp) +
                   " at a warp's barrier, " + std::to_string(order.size() - block->alive) + " ended";
  }
}
#else
inline void block_barrier(int) { block->barrier->arrive_and_wait(); }
inline void warp_barrier(unsigned) { block->warps[self->warp].barrier->arrive_and_wait(); }  // whole warps only

inline void run_threads(const std::vector<unsigned>& order) {
  block->barrier = std::make_unique<std::barrier<>>(order.size());
  for (Warp& w : block->warps) w.barrier = std::make_unique<std::barrier<>>(w.lanes);
  std::vector<std::thread> threads;
  Block* here = block;
  for (unsigned i : order)
    threads.emplace_back([here, i] {
      block = here, self = &here->threads[i];
      (*here->kernel)();
      here->warps[self->warp].barrier->arrive_and_drop();
      here->barrier->arrive_and_drop();
    });
  for (auto& t : threads) t.join();
}
#endif

// order: 0 as numbered, 1 reversed, otherwise the seed of a shuffle.
inline void launch(dim3 grid, dim3 size, size_t dynamic, unsigned order_seed, const std::function<void()>& kernel) {
  const unsigned threads = size.x * size.y * size.z;
  last_error.clear();
  const size_t fixed = __stop_shared_memory - __start_shared_memory;
  if (!threads || threads > 1024 || dynamic + fixed > SHARED_BYTES) { last_error = "an impossible launch"; return; }
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  if (order_seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(order_seed));
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
    Block here;
    block = &here;
    here.index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    here.size = size, here.grid = grid, here.kernel = &kernel, here.alive = threads;
    here.dynamic.assign(dynamic + 16, POISON);
    std::memset(__start_shared_memory, POISON, fixed);
    here.threads.resize(threads);
    here.warps = std::vector<Warp>((threads + WARP - 1) / WARP);
    here.warps.back().lanes = threads % WARP ? threads % WARP : WARP;
    for (unsigned t = 0; t < threads; ++t) {
      here.threads[t].index = {t % size.x, t / size.x % size.y, t / (size.x * size.y)};
      here.threads[t].lane = t % WARP, here.threads[t].warp = t / WARP;
    }
    run_threads(order);
    last_error = here.error;
    if (!last_error.empty()) return;
  }
}

using Fragment = std::array<unsigned, 6>;  // what a lane brings to one product of matrices

inline const Fragment (&share(const Fragment& mine))[WARP] {  // every lane's, to every lane
  Thread& me = *self;
  auto& fragments = block->warps[me.warp].fragment[me.matrix_parity++ & 1];
  fragments[me.lane] = mine;
  warp_barrier(~0u);
  return fragments;
}

template <class T> T exchange(T value, unsigned mask, int source) {  // source: a lane; -1: one's own
  Thread& me = *self;
  Warp& warp = block->warps[me.warp];
  auto& slots = warp.slot[me.parity++ & 1];
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof value);
  slots[me.lane] = raw;
  warp_barrier(mask);
  if (source < 0 || source >= static_cast<int>(WARP)) source = me.lane;
  if (!(mask >> source & 1)) block->error = "a shuffle reads a lane outside its mask";
  std::memcpy(&value, &slots[source], sizeof value);
#ifdef REAL_THREADS
  warp_barrier(mask);
#endif
  return value;
}

inline float as_float(unsigned x) { float f; std::memcpy(&f, &x, 4); return f; }

inline unsigned tf32_of(float x) {  // to 10 bits of mantissa, halves away from zero
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return (bits & 0x7F800000) == 0x7F800000 ? bits : (bits + 0x1000) & 0xFFFFE000;
}

// mma.m16n8k8 as PTX lays it out: with group = lane / 4 and place = lane % 4, a[q] is A[group + q%2*8][place + q/2*4],
// b[q] is B[place + q*4][group], d[q] is D[group + q/2*8][place*2 + q%2]. The hardware's order of sums is its own.
inline void multiply_16x8x8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const auto& fragment = share(std::array{a[0], a[1], a[2], a[3], b[0], b[1]});
  float A[16][8], B[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int q = 0; q < 4; ++q) A[lane / 4 + q % 2 * 8][lane % 4 + q / 2 * 4] = as_float(fragment[lane][q]);
    for (int q = 0; q < 2; ++q) B[lane % 4 + q * 4][lane / 4] = as_float(fragment[lane][4 + q]);
  }
  const int group = self->lane / 4, place = self->lane % 4;
  for (int q = 0; q < 4; ++q)
    for (int k = 0; k < 8; ++k) d[q] += A[group + q / 2 * 8][k] * B[k][place * 2 + q % 2];
}

// mma.m16n8k32 of signed bytes as PTX lays it out, four inputs to a register: with group and place as above, a[q] has
// A[group + q%2*8][place*4 + q/2*16 ...], b[q] has B[place*4 + q*16 ...][group], d[q] is D[group + q/2*8][place*2 + q%2].
inline void multiply_16x8x32_s8(int (&d)[4], const int (&a)[4], const int (&b)[2]) {
  auto raw = [](int x) { return static_cast<unsigned>(x); };
  const auto& fragment = share(std::array{raw(a[0]), raw(a[1]), raw(a[2]), raw(a[3]), raw(b[0]), raw(b[1])});
  const int group = self->lane / 4, place = self->lane % 4;
  for (int q = 0; q < 4; ++q)
    for (int lane = 0; lane < 4; ++lane)  // of a row of A, and of a column of B
      for (int half = 0; half < 2; ++half) {
        const unsigned x = fragment[group * 4 + lane][q / 2 + half * 2];
        const unsigned y = fragment[(place * 2 + q % 2) * 4 + lane][4 + half];
        for (int i = 0; i < 32; i += 8) d[q] += static_cast<int8_t>(x >> i) * static_cast<int8_t>(y >> i);
      }
}

// What the launcher must hand over, one letter for each parameter: of a pointer's target ('p' before it) or a value.
template <class T> std::string letter() {
  if constexpr (std::is_pointer_v<T>) return "p" + letter<std::remove_cv_t<std::remove_pointer_t<T>>>();
  else if constexpr (std::is_same_v<T, bool>) return "?";
  else if constexpr (std::is_floating_point_v<T>) return sizeof(T) == 4 ? "f" : "d";
  else if constexpr (sizeof(T) == 1) return std::is_signed_v<T> ? "b" : "B";
  else if constexpr (sizeof(T) == 4) return std::is_signed_v<T> ? "i" : "I";
  else return std::is_signed_v<T> ? "q" : "Q";
}
template <class... A> std::string signature(void (*)(A...)) { return ((letter<A>() + " ") + ... + ""); }
template <class... A, size_t... I> void call(void (*f)(A...), void** a, std::index_sequence<I...>) {
  f(*static_cast<std::decay_t<A>*>(a[I])...);
}
template <class... A> const char* enter(void (*f)(A...), const unsigned* g, const unsigned* b, size_t dynamic, unsigned order, void** a) {
  launch({g[0], g[1], g[2]}, {b[0], b[1], b[2]}, dynamic, order, [=] { call(f, a, std::index_sequence_for<A...>{}); });
  return last_error.c_str();
}
}  // namespace emulator

#define EMULATED(kernel)                                                                                           \
  extern "C" const char* launch_##kernel(const unsigned* g, const unsigned* b, size_t s, unsigned o, void** a) {   \
    return emulator::enter(&kernel, g, b, s, o, a);                                                                \
  }                                                                                                                \
  extern "C" const char* signature_##kernel() { static std::string s = emulator::signature(&kernel); return s.c_str(); }

#define threadIdx (emulator::self->index)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->size)
#define gridDim (emulator::block->grid)
#define DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(emulator::block->dynamic.data()) + 15) & ~uintptr_t{15})
#define __syncthreads() emulator::block_barrier(__LINE__)
inline void __syncwarp(unsigned mask = ~0u) { emulator::warp_barrier(mask); }
template <class T> T __shfl_sync(unsigned mask, T v, int lane) { return emulator::exchange(v, mask, lane & 31); }
template <class T> T __shfl_xor_sync(unsigned mask, T v, int bits) { return emulator::exchange(v, mask, emulator::self->lane ^ bits); }
inline unsigned __ballot_sync(unsigned mask, int p) {
  unsigned votes = 0;
  for (unsigned l = 0; l < 32; ++l) {  // as many exchanges as lanes: slow and plain
    int vote = emulator::exchange(p != 0, mask, mask >> l & 1 ? static_cast<int>(l) : -1);
    if (mask >> l & 1 && l < emulator::block->warps[emulator::self->warp].lanes) votes |= static_cast<unsigned>(vote) << l;
  }
  return votes;
}
inline float __uint_as_float(unsigned x) { return emulator::as_float(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T atomicAdd(T* p, T v) {
  static_assert(std::is_integral_v<T>, "floats are never added atomically here: the order would show in the result");
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned by) {
  const int lane = static_cast<int>(emulator::self->lane) - static_cast<int>(by);
  return emulator::exchange(v, mask, lane < 0 ? -1 : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned by) {
  const int lane = static_cast<int>(emulator::self->lane + by);
  return emulator::exchange(v, mask, lane > 31 ? -1 : lane);
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return !__any_sync(mask, !p); }
template <class To, class From> To bits_as(From x) { To y; static_assert(sizeof x == sizeof y); std::memcpy(&y, &x, sizeof y); return y; }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return bits_as<double>(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
using std::exp;
using std::expm1;
using std::fabs;
using std::fma;
using std::isfinite;
using std::isnan;
using std::log;
using std::max;
using std::min;
using std::rint;
using std::sqrt;
