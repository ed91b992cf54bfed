// What `cuda_on_cpu.hpp` declares: fibers, barriers and launches. Compiled once and linked to each file of kernels.
//
// The thread sanitizer knows fibers: to it each CUDA thread is a thread of its own, ordered with others by barriers
// alone, so it finds a race whatever the order in which the fibers happened to run. This file itself is compiled without
// it then, with -DWATCHES_RACES.
#include "cuda_on_cpu.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#ifdef WATCHES_RACES
extern "C" void __tsan_acquire(void*), __tsan_release(void*), __tsan_switch_to_fiber(void*, unsigned);
extern "C" void *__tsan_create_fiber(unsigned), *__tsan_get_current_fiber();
// The sanitizer's fibers for even and odd blocks, which are not ordered either. All libraries use those of the first
// that was loaded, for there may be 8128.
extern "C" {
[[gnu::visibility("default")]] void* emulator_fibers[2][1024];
}
#endif

// Begin and end of the section, from the linker: absent where no kernel has shared memory.
extern "C" [[gnu::weak, gnu::visibility("hidden")]] char __start_shared_memory[], __stop_shared_memory[];

namespace emulator {
namespace {
constexpr size_t PAGE_BYTES = 4096;
constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / WARP;
constexpr int POISON = 0xFF;  // as a float: NaN; as an int: -1
// An exchange's result is kept until its last lane has looked: meanwhile a warp ends fewer others than this.
constexpr unsigned KEPT_EXCHANGES = 64;

#ifdef WATCHES_RACES
// Makes the section whole pages, which `poison_shared_memory` needs.
[[gnu::section("shared_memory"), gnu::used]] alignas(PAGE_BYTES) char padding[PAGE_BYTES];
constexpr size_t PADDING_BYTES = PAGE_BYTES;
#else
constexpr size_t PADDING_BYTES = 0;
#endif

enum class Wait { no, block, warp };

struct Fiber : Thread {
  void* stack_pointer;
  unsigned place;  // in the order of running
  Wait wait;
  bool ended;
  unsigned mask;  // of the exchange that it waits in, as the next
  const char* operation;
  const void* shared;  // the result of its last exchange
};

struct alignas(16) Exchange { unsigned char byte[WARP * EXCHANGED_BYTES]; };

struct Warp {
  unsigned lanes;    // a bit for each that exists
  unsigned arrived;  // a bit for each that waits in an exchange
  Exchange brought, kept[KEPT_EXCHANGES];
  unsigned exchanges;
};

// The block that runs, and the launch.
Fiber fibers[MOST_THREADS];
Warp warps[MOST_WARPS];
std::vector<unsigned> order;  // of running
unsigned alive, arrived;      // threads: not ended; of them at __syncthreads, which is in:
const char* barrier_file;
int barrier_line;
std::string error;
void (*entry)(void**);
void** entry_arguments;
void* launcher;  // its stack pointer
void* nowhere;   // the stack pointer of a fiber that is left for good

// ---- what the thread sanitizer is told -----------------------------------------------------------------------------
#ifdef WATCHES_RACES
constexpr unsigned NO_SYNC = 1;
void* launcher_fiber;
unsigned parity;                          // of the block
char begun, ended, fenced, barrier[2], warp_arrived[MOST_WARPS];
unsigned barriers;

void happens_before(void* what) { __tsan_release(what); }
void happens_after(void* what) { __tsan_acquire(what); }

// By the launcher: what a fiber did before it makes another happens before that one.
void make_fibers(size_t count) {
  for (auto& of_block : emulator_fibers)
    for (size_t i = 0; i < count; ++i)
      if (!of_block[i]) of_block[i] = __tsan_create_fiber(0);
}

void enter_fiber(Fiber* to) {
  __tsan_switch_to_fiber(to ? emulator_fibers[parity][to - fibers] : launcher_fiber, NO_SYNC);
}
#define RACES(...) __VA_ARGS__
#else
#define RACES(...)
#endif

// ---- memory that no sanitizer sees written ---------------------------------------------------------------------------

void poison(char* to, size_t bytes) { asm volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(POISON) : "memory"); }

void copy(unsigned char* to, const void* from, size_t bytes) {
  if (bytes == 4) std::memcpy(to, from, 4);  // inline, as the next
  else if (bytes == 8) std::memcpy(to, from, 8);
  else asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

// ---- fibers --------------------------------------------------------------------------------------------------------
extern "C" [[gnu::visibility("hidden")]] void emulator_switch(void** save, void* load);
asm(R"(
.text
.hidden emulator_switch
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

Fiber* me() { return static_cast<Fiber*>(self); }

void go_to(Fiber* to, void** save) {  // to: null for the launcher
  RACES(enter_fiber(to);)
  self = to;
  emulator_switch(save, to ? to->stack_pointer : launcher);
}

// The next that may run, in the order of running; the last to be looked at is the fiber itself.
Fiber* next() {
  const unsigned count = order.size();
  for (unsigned step = 1, place = me()->place; step <= count; ++step) {
    if (++place == count) place = 0;
    Fiber& fiber = fibers[order[place]];
    if (!fiber.ended && fiber.wait == Wait::no) return &fiber;
  }
  return nullptr;
}

[[noreturn]] void report_deadlock() {
  const auto waiting = [](Wait at) {
    return std::to_string(std::count_if(order.begin(), order.end(), [at](unsigned i) {
      return !fibers[i].ended && fibers[i].wait == at;
    }));
  };
  fail(("deadlock: " + waiting(Wait::block) + " threads at __syncthreads, " + waiting(Wait::warp) +
        " at a warp's barrier, " + std::to_string(order.size() - alive) + " ended").c_str());
}

void wait_as(Wait wait) {
  Fiber* mine = me();
  mine->wait = wait;
  Fiber* other = next();
  if (!other) report_deadlock();
  go_to(other, &mine->stack_pointer);
}

void end_barrier() {
  arrived = 0;
  RACES(++barriers;)
  for (unsigned i : order)
    if (fibers[i].wait == Wait::block) fibers[i].wait = Wait::no;
}

extern "C" void emulator_thread() {
  RACES(happens_after(&begun);)
  entry(entry_arguments);
  RACES(happens_before(&ended); happens_before(&barrier[barriers & 1]);)
  me()->ended = true;
  if (--alive && arrived == alive) end_barrier();  // those that ended are not waited for
  Fiber* other = alive ? next() : nullptr;
  if (alive && !other) report_deadlock();
  go_to(other, &nowhere);
}

void run_block() {
  static char* all_stacks = nullptr;
  const size_t bytes = STACK_BYTES * MOST_THREADS;
  if (!all_stacks)
    all_stacks = static_cast<char*>(mmap(nullptr, 2 * bytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  char* stacks = all_stacks;
  RACES(parity ^= 1; stacks += parity * bytes;)  // else blocks would race for their stacks
  for (unsigned place = 0; place < order.size(); ++place) {
    const unsigned i = order[place];
    const dim3 size = block.size;
    Fiber& fiber = fibers[i];
    fiber = Fiber{};
    fiber.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    fiber.lane = i % WARP, fiber.warp = i / WARP, fiber.place = place;
    // Six registers, the entry, and a return address that is never used.
    void** frame = reinterpret_cast<void**>(stacks + STACK_BYTES * (i + 1) - 64);
    std::fill(frame, frame + 8, nullptr);
    frame[6] = reinterpret_cast<void*>(&emulator_thread);
    fiber.stack_pointer = frame;
  }
  for (unsigned i = 0; i * WARP < order.size(); ++i) {
    const unsigned lanes = std::min<unsigned>(WARP, order.size() - i * WARP);
    warps[i].lanes = lanes == WARP ? ~0u : (1u << lanes) - 1;
    warps[i].arrived = 0;
  }
  alive = order.size(), arrived = 0;
  RACES(happens_before(&begun);)
  go_to(&fibers[order[0]], &launcher);
#ifdef __SANITIZE_ADDRESS__
  if (!error.empty()) __asan_unpoison_memory_region(stacks, STACK_BYTES * order.size());  // frames that never returned
#endif
}

void poison_shared_memory(size_t bytes) {
  if (!bytes) return;
  RACES(mmap(__start_shared_memory, bytes + PADDING_BYTES, PROT_READ | PROT_WRITE,  // what happened to it is forgotten
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);)
  poison(__start_shared_memory, bytes);
}

// seed: 0 as numbered, 1 reversed, otherwise a shuffle's.
void put_in_order(std::vector<unsigned>& items, size_t count, unsigned seed) {
  items.resize(count);
  std::iota(items.begin(), items.end(), 0u);
  if (seed == 1) std::reverse(items.begin(), items.end());
  if (seed > 1) std::shuffle(items.begin(), items.end(), std::mt19937(seed));
}
}  // namespace

Block block;
Thread* self;

[[noreturn]] void fail(const char* reason) {
  error = reason;
  go_to(nullptr, &nowhere);
  __builtin_unreachable();
}

void block_barrier(const char* file, int line) {
  RACES(const unsigned now = barriers & 1; happens_before(&barrier[now]);)
  if (!arrived) barrier_file = file, barrier_line = line;
  if (barrier_line != line || std::strcmp(barrier_file, file) != 0)
    fail(("threads wait at different __syncthreads: " + std::string(barrier_file) + ":" + std::to_string(barrier_line) +
          " and " + file + ":" + std::to_string(line)).c_str());
  if (++arrived == alive) end_barrier();
  else wait_as(Wait::block);
  RACES(happens_after(&barrier[now]);)
}

const void* share_bytes(const void* value, size_t bytes, unsigned& mask, const char* operation) {
  Fiber* mine = me();
  Warp& warp = warps[mine->warp];
  if (!(mask >> mine->lane & 1)) fail("a lane calls a *_sync with a mask that lacks it");
  mask &= warp.lanes;
  if (const unsigned others = warp.arrived & mask) {
    const Fiber& other = fibers[mine->warp * WARP + __builtin_ctz(others)];
    if (std::strcmp(other.operation, operation) != 0)
      fail(("lanes of a warp wait at " + std::string(other.operation) + " and at " + operation).c_str());
    if (other.mask != mask) fail("lanes of a warp wait for each other with different masks");
  }
  copy(warp.brought.byte + bytes * mine->lane, value, bytes);
  mine->mask = mask, mine->operation = operation;
  warp.arrived |= 1u << mine->lane;
  RACES(happens_before(&warp_arrived[mine->warp]);)
  if ((warp.arrived & mask) != mask) {
    wait_as(Wait::warp);
    RACES(happens_after(const_cast<void*>(mine->shared));)
    return mine->shared;
  }
  auto& kept = warp.kept[warp.exchanges++ % KEPT_EXCHANGES].byte;
  copy(kept, warp.brought.byte, bytes * WARP);
  warp.arrived &= ~mask;
  for (unsigned lane = 0; lane < WARP; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& fiber = fibers[mine->warp * WARP + lane];
    fiber.wait = Wait::no, fiber.shared = kept;
  }
  RACES(happens_after(&warp_arrived[mine->warp]); happens_before(kept);)
  return kept;
}

#ifdef WATCHES_RACES
void fence() { happens_before(&fenced), happens_after(&fenced); }
#endif

const char* launch(const unsigned* grid, const unsigned* size, size_t dynamic, unsigned order_seed, unsigned most_threads,
                   void (*kernel)(void**), void** arguments) {
  static std::vector<char> room;
  const size_t threads = size_t{size[0]} * size[1] * size[2], blocks = size_t{grid[0]} * grid[1] * grid[2];
  const size_t fixed = __stop_shared_memory - __start_shared_memory;
  const size_t shared = fixed ? fixed - PADDING_BYTES : 0;  // of all kernels of the file; nvcc knows that of each
  error.clear();
  if (!threads || !blocks || threads > MOST_THREADS) error = "an impossible launch";
  if (threads > most_threads) error = "more threads than its __launch_bounds__";
  if (dynamic > SHARED_BYTES) error = "too much shared memory";
  if (!error.empty()) return error.c_str();
  entry = kernel, entry_arguments = arguments;
  RACES(launcher_fiber = __tsan_get_current_fiber(); make_fibers(threads);)
  put_in_order(order, threads, order_seed);
  std::vector<unsigned> order_of_blocks;
  put_in_order(order_of_blocks, blocks, order_seed);
  room.resize(dynamic + 16);
  for (unsigned i : order_of_blocks) {
    block.grid = {grid[0], grid[1], grid[2]}, block.size = {size[0], size[1], size[2]};
    block.index = {i % grid[0], i / grid[0] % grid[1], i / (grid[0] * grid[1])};
    block.dynamic = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(room.data()) + 15) & ~uintptr_t{15});
    poison(room.data(), room.size());
    poison_shared_memory(shared);
    run_block();
    if (!error.empty()) break;
  }
  RACES(happens_after(&ended);)
  return error.c_str();
}
}  // namespace emulator
