// Products of int8 rows with packed weights, exact, then scaled to floats:
// y = (lowest * sum q + step * q @ code^T) * (beta * gamma/127), which is numpy_ref.linear.bit_linear.
//
// Weights lie as `packing.py` says: a word has the unsigned codes of 4*DEPTH inputs of one output, DEPTH quads, which
// Weights lie as `packing.py` says: a word has the unsigned codes of 4*DEPTH inputs of one output, DEPTH quads, unpacked
// and the tensor cores take both operands as signed. Sums of integers need no order: all kernels give the same bits.
//
// Grouped products read on the device where each expert's rows start; the host only bounds the number of tiles, and
// blocks beyond the last one end at once.

constexpr int PANEL = 16;  // outputs of one panel, each a word of a group
constexpr int PLACES = 4;  // inputs of a quad

// A word on its way: `next_quad` gives its quads one after the other, each the codes of four inputs.
struct TwoBits {
  static constexpr int DEPTH = 4, LOWEST = -1, STEP = 1;
  unsigned word;
};
struct BaseThree {
  static constexpr int DEPTH = 5, LOWEST = -1, STEP = 1;
  unsigned even, odd;  // bytes, in 16 bits each
};
struct OneBit {
  static constexpr int DEPTH = 8, LOWEST = -1, STEP = 2;
  unsigned word;
};

__device__ void take(TwoBits& of, unsigned word) { of.word = word; }
__device__ void take(OneBit& of, unsigned word) { of.word = word; }
__device__ void take(BaseThree& of, unsigned word) { of.even = word & 0x00ff00ffu, of.odd = word >> 8 & 0x00ff00ffu; }

__device__ int next_quad(TwoBits& of) {
  const unsigned codes = of.word & 0x03030303u;
  of.word >>= 2;
  return (int)codes;
}

__device__ int next_quad(OneBit& of) {
  const unsigned codes = of.word & 0x01010101u;
  of.word >>= 1;
  return (int)codes;
}

// Each byte is a fraction of 256: three times it pushes a code out at the top.
__device__ int next_quad(BaseThree& of) {
  of.even *= 3, of.odd *= 3;
  const unsigned codes = (of.even >> 8 & 0x00030003u) | (of.odd & 0x03000300u);
  of.even &= 0x00ff00ffu, of.odd &= 0x00ff00ffu;
  return (int)codes;
}

struct Product {
  const unsigned* code;  // [E, panels, groups, 16]
  const REAL* beta_EO;
  int panels, groups, O;
  const int* q;  // int8 [.., width], four to an int, zero beyond the inputs
  const REAL* scale_N;
  const int* sum_N;
  int width;                // of a row of q, in ints
  const long long* source;  // y's row -> row of q, or -1; null: the same
  REAL* y_RO;
};

__device__ long long row_of(const Product& p, int r) { return p.source ? p.source[r] : r; }

// One result, whose sum of codes is `sum`.
template <class Format> __device__ void finish(const Product& p, int e, int r, int o, int sum) {
  const long long n = row_of(p, r);
  REAL y = 0;
  if (n >= 0)
    y = (REAL)(Format::LOWEST * p.sum_N[n] + Format::STEP * sum) * (p.beta_EO[(long long)e * p.O + o] * p.scale_N[n]);
  p.y_RO[(long long)r * p.O + o] = y;
}

struct Tile { int e, first, last; };  // rows first .. last-1 of matrix e; e = -1: none

// Which rows of which expert are tile `index`, when each expert's rows are cut into tiles of `rows`. Whole warps ask.
__device__ Tile tile_of_experts(const long long* start_Z, int E, int rows, int index) {
  const int lane = threadIdx.x % WARP;
  for (int first_expert = 0; first_expert < E; first_expert += WARP) {
    const int e = first_expert + lane;
    const int first = e < E ? (int)start_Z[e] : 0, last = e < E ? (int)start_Z[e + 1] : 0;
    const int tiles = (last - first + rows - 1) / rows;
    int up_to = tiles;  // of this lane's expert and those before it
    for (int by = 1; by < WARP; by *= 2) {
      const int before = __shfl_up_sync(ALL_LANES, up_to, by);
      if (lane >= by) up_to += before;
    }
    const unsigned beyond = __ballot_sync(ALL_LANES, up_to > index);
    if (beyond) {
      const int found = __ffs((int)beyond) - 1;
      const int start = first + (index - (up_to - tiles)) * rows;
      const int from = __shfl_sync(ALL_LANES, start, found), end = __shfl_sync(ALL_LANES, last, found);
      return {first_expert + found, from, min(from + rows, end)};
    }
    index -= __shfl_sync(ALL_LANES, up_to, WARP - 1);
  }
  return {-1, 0, 0};
}

__device__ Tile tile_of_rows(int N, int rows, int index) { return {0, index * rows, min((index + 1) * rows, N)}; }

// ---- few rows ---------------------------------------------------------------------------------

constexpr int FEW_WARPS = 4, FEW_THREADS = FEW_WARPS * WARP;

template <int DEPTH> __device__ void load_quads(const int* from, int (&quads)[DEPTH]) {
  if constexpr (DEPTH % 4 == 0) {
    #pragma unroll
    for (int k = 0; k < DEPTH; k += 4) {
      const int4 four = *(const int4*)(from + k);
      quads[k] = four.x, quads[k + 1] = four.y, quads[k + 2] = four.z, quads[k + 3] = four.w;
    }
  } else {
    #pragma unroll
    for (int k = 0; k < DEPTH; ++k) quads[k] = from[k];
  }
}

constexpr int FEW_ROWS = 8;  // the most that a block takes

// Where a block's warps lay their sums: of each row, a panel's.
__device__ int* room_of_rows() {
  __shared__ int room[FEW_WARPS * FEW_ROWS * PANEL];
  return room;
}

// A block has one panel and up to ROWS rows. A warp reads 8 groups of the panel at once, 16 bytes a lane: the words of
// four outputs. Each code is read from memory once, and unpacked once for all rows.
template <class Format, int ROWS>
__device__ void product_of_few(const Product& p, Tile tile, int panel) {
  constexpr int DEPTH = Format::DEPTH;
  int* room = room_of_rows();  // [FEW_WARPS, ROWS, PANEL]
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, outputs = lane % 4, rows = tile.last - tile.first;
  const uint4* code = (const uint4*)(p.code + ((long long)tile.e * p.panels + panel) * p.groups * PANEL);
  const int* q[ROWS];
  #pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const long long n = r < rows ? row_of(p, tile.first + r) : -1;
    q[r] = p.q + (n < 0 ? 0 : n) * p.width;
  }

  int sum[ROWS][4] = {};
  for (int group = warp * 8 + lane / 4; group < p.groups; group += FEW_WARPS * 8) {
    const uint4 words = code[group * 4 + outputs];
    Format word[4];
    take(word[0], words.x), take(word[1], words.y), take(word[2], words.z), take(word[3], words.w);
    int codes[4][DEPTH];
    #pragma unroll
    for (int o = 0; o < 4; ++o)
      #pragma unroll
      for (int quad = 0; quad < DEPTH; ++quad) codes[o][quad] = next_quad(word[o]);
    #pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (r < rows) {
        int quads[DEPTH];
        load_quads(q[r] + group * DEPTH, quads);
        #pragma unroll
        for (int o = 0; o < 4; ++o)
          #pragma unroll
          for (int quad = 0; quad < DEPTH; ++quad) sum[r][o] = __dp4a(quads[quad], codes[o][quad], sum[r][o]);
      }
  }

  #pragma unroll
  for (int r = 0; r < ROWS; ++r)
    if (r < rows)
      #pragma unroll
      for (int o = 0; o < 4; ++o) {
        #pragma unroll
        for (int lanes = 4; lanes < WARP; lanes *= 2) sum[r][o] += __shfl_xor_sync(ALL_LANES, sum[r][o], lanes);
        if (lane < 4) room[(warp * ROWS + r) * PANEL + lane * 4 + o] = sum[r][o];
      }
  __syncthreads();
  const int r = threadIdx.x / PANEL, output = threadIdx.x % PANEL, o = panel * PANEL + output;
  if (r >= rows || o >= p.O) return;
  int total = 0;
  #pragma unroll
  for (int w = 0; w < FEW_WARPS; ++w) total += room[(w * ROWS + r) * PANEL + output];
  finish<Format>(p, tile.e, tile.first + r, o, total);
}

// depth names the format: 4 is ternary-2bit, 5 ternary-base3, 8 sign-1bit.
template <int ROWS>
__device__ void product_of_few(const Product& p, int depth, Tile tile, int panel) {
  if (depth == TwoBits::DEPTH) product_of_few<TwoBits, ROWS>(p, tile, panel);
  else if (depth == BaseThree::DEPTH) product_of_few<BaseThree, ROWS>(p, tile, panel);
  else product_of_few<OneBit, ROWS>(p, tile, panel);
}

// numpy_ref.linear.bit_linear of one row: a step of decoding.
// Work 2 I O integer operations; moves O I / 4 bytes of 2-bit codes: 8 operations a byte: bound by memory.
extern "C" __global__ void __launch_bounds__(FEW_THREADS)
product_of_row(const unsigned char* code, const REAL* beta_EO, int panels, int groups, int O, int depth,
               const signed char* q_NI, const REAL* scale_N, const int* sum_N, int width, int N, REAL* y_NO) {
  const Product p = {(const unsigned*)code, beta_EO, panels, groups, O, (const int*)q_NI, scale_N, sum_N, width / 4,
                     nullptr, y_NO};
  product_of_few<1>(p, depth, tile_of_rows(N, 1, blockIdx.x), blockIdx.y);
}

// numpy_ref.linear.bit_linear of some rows, up to 8 a block; on devices without int8 tensor cores, of any number.
// Work 2 N I O; moves O I / 4 bytes of 2-bit codes for each 8 rows, from memory once: up to 64 operations a byte: bound
// by memory for 8 rows, by the byte dot products (64 a cycle and multiprocessor) and the nearest cache for many.
extern "C" __global__ void __launch_bounds__(FEW_THREADS)
product_of_rows(const unsigned char* code, const REAL* beta_EO, int panels, int groups, int O, int depth,
                const signed char* q_NI, const REAL* scale_N, const int* sum_N, int width, int N, REAL* y_NO) {
  const Product p = {(const unsigned*)code, beta_EO, panels, groups, O, (const int*)q_NI, scale_N, sum_N, width / 4,
                     nullptr, y_NO};
  product_of_few<FEW_ROWS>(p, depth, tile_of_rows(N, FEW_ROWS, blockIdx.x), blockIdx.y);
}

// The same with each row's expert: bit_linear of numpy_ref.experts, expert by expert.
// Work 2 R I O; moves O I / 4 bytes of 2-bit codes for each expert that has rows: bound by memory.
extern "C" __global__ void __launch_bounds__(FEW_THREADS)
grouped_product_of_rows(const unsigned char* code, const REAL* beta_EO, int panels, int groups, int O, int depth,
                        const signed char* q_NI, const REAL* scale_N, const int* sum_N, int width,
                        const long long* start_Z, int E, const long long* source_R, int gathered, REAL* y_RO) {
  const Tile tile = tile_of_experts(start_Z, E, FEW_ROWS, blockIdx.x);
  if (tile.e < 0) return;
  const Product p = {(const unsigned*)code, beta_EO, panels, groups, O, (const int*)q_NI, scale_N, sum_N, width / 4,
                     gathered ? source_R : nullptr, y_RO};
  product_of_few<FEW_ROWS>(p, depth, tile, blockIdx.y);
}

// ---- many rows, on tensor cores ---------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define HAS_INT8_MMA 1
#else
#define HAS_INT8_MMA 0
#endif

// d += a b^T, a warp's 16 x 8 results of 32 inputs; which lane holds what, see `product_of_tile`.
__device__ void multiply_16x8x32(int (&d)[4], const int (&a)[4], const int (&b)[2]) {
#if defined(__CUDACC__) && HAS_INT8_MMA
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  emulator::multiply_16x8x32_s8(d, a, b);
#endif
}

// A step takes four groups of inputs. A row of the tile then has 4*DEPTH ints of q, and so much room that the loads of
// eight rows by four lanes each hit all banks of shared memory evenly.
template <class Format> constexpr int STEP_INTS = 4 * Format::DEPTH;
template <class Format> constexpr int ROW_INTS = STEP_INTS<Format> + (Format::DEPTH == OneBit::DEPTH ? 4 : 0);
constexpr int MOST_ROW_INTS = 36;

// Two steps' rows, of any format: of the tiles of 128 rows, and of those of 32.
__device__ int* room_of_tiles() {
  __shared__ int4 room[2 * 128 * MOST_ROW_INTS / 4];
  return (int*)room;
}

__device__ int* room_of_small_tiles() {
  __shared__ int4 room[2 * 32 * MOST_ROW_INTS / 4];
  return (int*)room;
}

// A block of DOWN x ACROSS warps; a warp has ROW_TILES*16 rows x 32 outputs, in products of 16 x 8 x 32.
//
// In such a product lane 4 g + p holds rows g and g+8 and output g, and of these the quads p and p+4 of eight. Which
// inputs those are is free, if rows and weights agree. Here the lane takes group p of the step's four: its words are
// unpacked in place, quads 2m and 2m+1 serve product m, and of the rows it reads 4*DEPTH bytes side by side. base-3's
// fifth quad has a zero beside it.
template <class Format, int DOWN, int ACROSS, int ROW_TILES>
__device__ void product_of_tile(const Product& p, Tile tile, int column) {
#if HAS_INT8_MMA
  constexpr int DEPTH = Format::DEPTH, PRODUCTS = (DEPTH + 1) / 2, ROWS = DOWN * ROW_TILES * 16;
  constexpr int THREADS = DOWN * ACROSS * WARP, PIECES_OF_ROW = STEP_INTS<Format> / 4, PIECES = ROWS * PIECES_OF_ROW;
  constexpr int EACH = (PIECES + THREADS - 1) / THREADS;  // 16-byte pieces that a thread brings in a step
  int* room = ROWS == 128 ? room_of_tiles() : room_of_small_tiles();
  const int t = threadIdx.x, lane = t % WARP, warp = t / WARP, g = lane / 4, place = lane % 4;
  const int warp_row = warp / ACROSS * ROW_TILES * 16, panel = (column + warp % ACROSS * 32) / PANEL;
  const unsigned* code_of_panels = p.code + ((long long)tile.e * p.panels + panel) * p.groups * PANEL;

  const int* from[EACH];  // what this thread brings; null: zeros
  #pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int piece = t + k * THREADS, row = piece / PIECES_OF_ROW;
    const long long n = piece < PIECES && tile.first + row < tile.last ? row_of(p, tile.first + row) : -1;
    from[k] = n < 0 ? nullptr : p.q + n * p.width + piece % PIECES_OF_ROW * 4;
  }
  int4 brought[EACH];
  unsigned words[4];
  auto fetch = [&](int group) {  // of the step that starts at this group
    #pragma unroll
    for (int k = 0; k < EACH; ++k)
      brought[k] = from[k] ? *(const int4*)(from[k] + group * DEPTH) : int4{0, 0, 0, 0};
    #pragma unroll
    for (int c = 0; c < 4; ++c)
      words[c] = panel + c / 2 < p.panels && group + place < p.groups
                     ? code_of_panels[((long long)(c / 2) * p.groups + group + place) * PANEL + c % 2 * 8 + g]
                     : 0;
  };

  int sum[ROW_TILES][4][4] = {};
  fetch(0);
  for (int group = 0, stage = 0; group < p.groups; group += 4, stage ^= 1) {
    int* rows = room + stage * ROWS * ROW_INTS<Format>;
    #pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int piece = t + k * THREADS;
      if (piece < PIECES)
        *(int4*)(rows + piece / PIECES_OF_ROW * ROW_INTS<Format> + piece % PIECES_OF_ROW * 4) = brought[k];
    }
    int b[4][2 * PRODUCTS];
    #pragma unroll
    for (int c = 0; c < 4; ++c) {
      Format word;
      take(word, words[c]);
      #pragma unroll
      for (int quad = 0; quad < 2 * PRODUCTS; ++quad) b[c][quad] = quad < DEPTH ? next_quad(word) : 0;
    }
    __syncthreads();  // the other stage is free: whoever passed here has done the step before it
    if (group + 4 < p.groups) fetch(group + 4);
    #pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const int* upper = rows + (warp_row + r * 16 + g) * ROW_INTS<Format> + place * DEPTH;
      int high[DEPTH], low[DEPTH];
      load_quads(upper, high);
      load_quads(upper + 8 * ROW_INTS<Format>, low);
      #pragma unroll
      for (int m = 0; m < PRODUCTS; ++m) {
        const bool pair = 2 * m + 1 < DEPTH;
        const int a[4] = {high[2 * m], low[2 * m], pair ? high[2 * m + 1] : 0, pair ? low[2 * m + 1] : 0};
        #pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int weights[2] = {b[c][2 * m], b[c][2 * m + 1]};
          multiply_16x8x32(sum[r][c], a, weights);
        }
      }
    }
  }

  #pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
    #pragma unroll
    for (int c = 0; c < 4; ++c)
      #pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = tile.first + warp_row + r * 16 + k / 2 * 8 + g;
        const int o = panel * PANEL + c * 8 + place * 2 + k % 2;
        if (row < tile.last && o < p.O) finish<Format>(p, tile.e, row, o, sum[r][c][k]);
      }
#endif
}

template <int DOWN, int ACROSS, int ROW_TILES>
__device__ void product_of_tile(const Product& p, int depth, Tile tile, int column) {
  if (depth == TwoBits::DEPTH) product_of_tile<TwoBits, DOWN, ACROSS, ROW_TILES>(p, tile, column);
  else if (depth == BaseThree::DEPTH) product_of_tile<BaseThree, DOWN, ACROSS, ROW_TILES>(p, tile, column);
  else product_of_tile<OneBit, DOWN, ACROSS, ROW_TILES>(p, tile, column);
}

// numpy_ref.linear.bit_linear of many rows, 128 rows x 128 outputs a block.
// Work 2 N I O integer operations; moves N I + O I / 4 bytes of operands and 4 N O of results: at N = I = O = 4096 that
// is 137 G operations and 88 MB, 1560 a byte: bound by the tensor cores (about 0.6 of 1600 TOP/s without wgmma).
extern "C" __global__ void __launch_bounds__(256)
product_of_tiles(const unsigned char* code, const REAL* beta_EO, int panels, int groups, int O, int depth,
                 const signed char* q_NI, const REAL* scale_N, const int* sum_N, int width, int N, REAL* y_NO) {
  const Product p = {(const unsigned*)code, beta_EO, panels, groups, O, (const int*)q_NI, scale_N, sum_N, width / 4,
                     nullptr, y_NO};
  product_of_tile<2, 4, 4>(p, depth, tile_of_rows(N, 128, blockIdx.x), blockIdx.y * 128);
}

// The same with 32 rows x 64 outputs a block, where larger tiles would leave multiprocessors idle.
// Work and bytes as above; each byte of q serves 64 outputs, from the L2 cache: bound by its latency.
extern "C" __global__ void __launch_bounds__(128)
product_of_small_tiles(const unsigned char* code, const REAL* beta_EO, int panels, int groups, int O, int depth,
                       const signed char* q_NI, const REAL* scale_N, const int* sum_N, int width, int N, REAL* y_NO) {
  const Product p = {(const unsigned*)code, beta_EO, panels, groups, O, (const int*)q_NI, scale_N, sum_N, width / 4,
                     nullptr, y_NO};
  product_of_tile<2, 2, 1>(p, depth, tile_of_rows(N, 32, blockIdx.x), blockIdx.y * 64);
}

// product_of_tiles with each row's expert: bit_linear of numpy_ref.experts, expert by expert.
// Work 2 R I O; moves R I + E O I / 4 + 4 R O bytes: bound by the tensor cores where I and O are some hundreds.
extern "C" __global__ void __launch_bounds__(256)
grouped_product_of_tiles(const unsigned char* code, const REAL* beta_EO, int panels, int groups, int O, int depth,
                         const signed char* q_NI, const REAL* scale_N, const int* sum_N, int width,
                         const long long* start_Z, int E, const long long* source_R, int gathered, REAL* y_RO) {
  const Tile tile = tile_of_experts(start_Z, E, 128, blockIdx.x);
  if (tile.e < 0) return;
  const Product p = {(const unsigned*)code, beta_EO, panels, groups, O, (const int*)q_NI, scale_N, sum_N, width / 4,
                     gathered ? source_R : nullptr, y_RO};
  product_of_tile<2, 4, 4>(p, depth, tile, blockIdx.y * 128);
}

// product_of_small_tiles with each row's expert, for experts with few rows.
// Work and bytes as above: bound by the caches, or by memory where most experts' rows are fewer than a tile's.
extern "C" __global__ void __launch_bounds__(128)
grouped_product_of_small_tiles(const unsigned char* code, const REAL* beta_EO, int panels, int groups, int O, int depth,
                               const signed char* q_NI, const REAL* scale_N, const int* sum_N, int width,
                               const long long* start_Z, int E, const long long* source_R, int gathered, REAL* y_RO) {
  const Tile tile = tile_of_experts(start_Z, E, 32, blockIdx.x);
  if (tile.e < 0) return;
  const Product p = {(const unsigned*)code, beta_EO, panels, groups, O, (const int*)q_NI, scale_N, sum_N, width / 4,
                     gathered ? source_R : nullptr, y_RO};
  product_of_tile<2, 2, 1>(p, depth, tile, blockIdx.y * 64);
}
