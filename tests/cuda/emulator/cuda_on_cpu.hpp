// CUDA C on the CPU, for tests: the kernels' own .cu is compiled unchanged by g++ behind this header.
//
// A block runs at a time. Each CUDA thread is a fiber with a stack of its own; barriers, warp shuffles and votes switch
// between them (`cuda_on_cpu.cpp`). The order in which blocks and threads run is an argument of the launch, so that a
// result that depends on it shows.
//
// Reported: divergent and deadlocked barriers, wrong shuffle masks, impossible launches, shared memory that is read
// before it is written (poisoned), floats added atomically, and, through g++'s sanitizers, accesses out of bounds, loads
// of vectors at addresses that the hardware refuses, and data races, between blocks too.
// Not modelled: occupancy, weak memory order, asynchronous errors, the last bits of expf, logf and the like (their
// fast-math forms are refused), the order of sums in tensor cores, speed.
#pragma once
#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif
#include <cmath>  // with std::min and std::max; the rest of the standard library would cost seconds
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

struct dim3 { unsigned x = 1, y = 1, z = 1; };

#define __global__ inline  // as `__device__` is: shared memory of both kinds must be in sections of one kind
#define __device__ inline  // not `static`: member functions have it too
#define __host__
#define __forceinline__
#define __launch_bounds__(...)  // `EMULATED` is told them
// One block at a time, so a block's shared memory can be static: in a section of its own, to be poisoned at once.
#define __shared__ static __attribute__((section("shared_memory")))

namespace emulator {
constexpr unsigned WARP = 32;
constexpr size_t SHARED_BYTES = 48 << 10;  // what every device has without being asked
constexpr size_t EXCHANGED_BYTES = 24;     // the most that a lane brings to one exchange

struct Thread {
  dim3 index;
  unsigned lane, warp;
};

struct Block {
  dim3 index, size, grid;
  unsigned char* dynamic;  // shared memory of the size that the launch asked for
};

#pragma GCC visibility push(hidden)
extern Block block;
extern Thread* self;

[[noreturn]] void fail(const char* error);  // ends the launch
void block_barrier(const char* file, int line);
// A warp's barrier; afterwards what each of the mask's lanes brought, as an array of 32 (garbage of other lanes).
const void* share_bytes(const void* mine, size_t bytes, unsigned& mask, const char* operation);
const char* launch(const unsigned* grid, const unsigned* block, size_t dynamic, unsigned order, unsigned most_threads,
                   void (*kernel)(void**), void** arguments);
#ifdef __SANITIZE_THREAD__
void fence();
#endif
#pragma GCC visibility pop

template <class T> using Lanes = const T (&)[WARP];

template <class T> Lanes<T> share(const T& mine, unsigned mask = ~0u, const char* operation = "a product of matrices") {
  static_assert(sizeof(T) <= EXCHANGED_BYTES && std::is_trivially_copyable_v<T>);
  return *static_cast<const T(*)[WARP]>(share_bytes(&mine, sizeof mine, mask, operation));
}

// What lane `source` brings; -1: one's own.
template <class T> T exchange(T value, unsigned mask, int source) {
  const auto values = static_cast<const T*>(share_bytes(&value, sizeof value, mask, "a shuffle"));
  if (source < 0 || source >= static_cast<int>(WARP)) return value;
  if (!(mask >> source & 1)) fail("a shuffle reads a lane outside its mask");
  return values[source];
}

inline float as_float(unsigned x) { float f; std::memcpy(&f, &x, 4); return f; }

inline unsigned tf32_of(float x) {  // to 10 bits of mantissa, halves away from zero
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return (bits & 0x7F800000) == 0x7F800000 ? bits : (bits + 0x1000) & 0xFFFFE000;
}

struct Fragment { unsigned part[6]; };  // what a lane brings to one product of matrices

// mma.m16n8k8 as PTX lays it out: with group = lane / 4 and place = lane % 4, a[q] is A[group + q%2*8][place + q/2*4],
// b[q] is B[place + q*4][group], d[q] is D[group + q/2*8][place*2 + q%2]. The hardware's order of sums is its own.
inline void multiply_16x8x8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const auto& fragment = share(Fragment{{a[0], a[1], a[2], a[3], b[0], b[1]}});
  float A[16][8], B[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int q = 0; q < 4; ++q) A[lane / 4 + q % 2 * 8][lane % 4 + q / 2 * 4] = as_float(fragment[lane].part[q]);
    for (int q = 0; q < 2; ++q) B[lane % 4 + q * 4][lane / 4] = as_float(fragment[lane].part[4 + q]);
  }
  const int group = self->lane / 4, place = self->lane % 4;
  for (int q = 0; q < 4; ++q)
    for (int k = 0; k < 8; ++k) d[q] += A[group + q / 2 * 8][k] * B[k][place * 2 + q % 2];
}

// mma.m16n8k32 of signed bytes as PTX lays it out, four inputs to a register: with group and place as above, a[q] has
// A[group + q%2*8][place*4 + q/2*16 ...], b[q] has B[place*4 + q*16 ...][group], d[q] is D[group + q/2*8][place*2 + q%2].
inline void multiply_16x8x32_s8(int (&d)[4], const int (&a)[4], const int (&b)[2]) {
  auto raw = [](int x) { return static_cast<unsigned>(x); };
  const auto& fragment = share(Fragment{{raw(a[0]), raw(a[1]), raw(a[2]), raw(a[3]), raw(b[0]), raw(b[1])}});
  const int group = self->lane / 4, place = self->lane % 4;
  for (int q = 0; q < 4; ++q)
    for (int lane = 0; lane < 4; ++lane)  // of a row of A, and of a column of B
      for (int half = 0; half < 2; ++half) {
        const unsigned x = fragment[group * 4 + lane].part[q / 2 + half * 2];
        const unsigned y = fragment[(place * 2 + q % 2) * 4 + lane].part[4 + half];
        for (int i = 0; i < 32; i += 8) d[q] += static_cast<int8_t>(x >> i) * static_cast<int8_t>(y >> i);
      }
}

// What the launcher must hand over, three characters for each parameter: 'p' of a pointer, then a letter of its target
// or of the value.
template <class T> constexpr char letter() {
  if constexpr (std::is_same_v<T, bool>) return '?';
  else if constexpr (std::is_floating_point_v<T>) return sizeof(T) == 4 ? 'f' : 'd';
  else if constexpr (sizeof(T) == 1) return std::is_signed_v<T> ? 'b' : 'B';
  else if constexpr (sizeof(T) == 4) return std::is_signed_v<T> ? 'i' : 'I';
  else return std::is_signed_v<T> ? 'q' : 'Q';
}
template <class T> using Target = std::remove_cv_t<std::remove_pointer_t<T>>;

template <auto kernel, class = decltype(kernel)> struct Entry;
template <auto kernel, class... A> struct Entry<kernel, void (*)(A...)> {
  static constexpr char signature[][3] = {{std::is_pointer_v<A> ? 'p' : ' ', letter<Target<A>>(), ' '}..., {0, 0, 0}};
  static void call(void** arguments) { call(arguments, std::index_sequence_for<A...>()); }
  template <size_t... I> static void call(void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::decay_t<A>*>(arguments[I])...);
  }
};
}  // namespace emulator

// A kernel's two doors, for the stand-in; after the kernel its launch bounds.
#define EMULATED(kernel, most_threads, ...)                                                                           \
  extern "C" [[gnu::visibility("default")]] const char* launch_##kernel(const unsigned* g, const unsigned* b, size_t s, \
                                                                        unsigned o, void** a) {                       \
    return emulator::launch(g, b, s, o, most_threads, &emulator::Entry<&kernel>::call, a);                            \
  }                                                                                                                   \
  extern "C" [[gnu::visibility("default")]] const char* signature_##kernel() {                                        \
    return emulator::Entry<&kernel>::signature[0];                                                                    \
  }

#define threadIdx (emulator::self->index)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::block.dynamic)
#define __syncthreads() emulator::block_barrier(__FILE__, __LINE__)
inline void __syncwarp(unsigned mask = ~0u) { emulator::share_bytes(nullptr, 0, mask, "__syncwarp"); }
template <class T> T __shfl_sync(unsigned mask, T v, int lane) { return emulator::exchange(v, mask, lane & 31); }
template <class T> T __shfl_xor_sync(unsigned mask, T v, int bits) { return emulator::exchange(v, mask, emulator::self->lane ^ bits); }
inline unsigned __ballot_sync(unsigned mask, int p) {
  const char vote = p != 0;
  const auto votes = static_cast<const char*>(emulator::share_bytes(&vote, 1, mask, "a vote"));
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emulator::WARP; ++lane)
    if (mask >> lane & 1 && votes[lane]) ballot |= 1u << lane;
  return ballot;
}
template <class T> unsigned __match_any_sync(unsigned mask, T v) {
  const auto values = static_cast<const T*>(emulator::share_bytes(&v, sizeof v, mask, "a match"));
  unsigned peers = 0;
  for (unsigned lane = 0; lane < emulator::WARP; ++lane)
    if (mask >> lane & 1 && values[lane] == v) peers |= 1u << lane;
  return peers;
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
#ifdef __SANITIZE_THREAD__
inline void __threadfence() { emulator::fence(); }
#else
inline void __threadfence() {}  // fibers see each other's memory in order
#endif
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
