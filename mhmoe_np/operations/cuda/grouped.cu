// Grouped GEMMs: products of rows sorted by expert with each expert's own matrix.
//
// Rows start_Z[e] .. start_Z[e+1]-1 are expert e's; start_Z lies on the device, so nobody waits for the counts. A block
// makes one tile of the result; which, it finds in start_Z, and blocks beyond the last tile end at once. The rows from
// start_Z[E] on, up to the bound that the host knows, are nobody's.
//
// A block of 256 threads multiplies STEP terms of all sums at a time. While it does, the numbers of the next step are on
// their way from memory into registers; shared memory has two buffers, so a step needs one barrier.

constexpr int THREADS = 256, STEP = 8;
constexpr int SIDE = REAL_IS_DOUBLE ? 4 : 8;  // a thread has SIDE x SIDE results
constexpr int TILE = 16 * SIDE;               // 128 x 128, of float64 64 x 64
constexpr int FEW = 32;                       // rows of a tile where experts have few
constexpr int PAD = 8;                        // so that the lines of 4 successive k lie in different banks
constexpr int WIDE = 16 / sizeof(REAL);       // numbers that one instruction moves at most

using Tile = REAL[STEP][TILE + PAD];  // a tile of an operand: k, line; a line is a row or a column of the result

struct alignas(16) Tiles { Tile a[2], b[2]; };  // 17 KiB, of float64 18
// A block's only ones.
__device__ Tiles& shared_tiles() {
  __shared__ Tiles tiles;
  return tiles;
}

// Where line `line` of term k lies. Without the exclusive or, lanes that write 4 terms each of 16 lines would meet in
// banks; as it is, they meet neither then nor when fragments are read. Runs of 16 lines stay together.
__device__ int place_of(int k, int line) { return line ^ (k / 4 * 16); }

// ---- moving runs of numbers ---------------------------------------------------------------------------------------

template <int N> struct alignas(N * sizeof(REAL)) Vector { REAL of[N]; };
constexpr __device__ int chunk_of(int N) { return N < WIDE ? N : WIDE; }

// The first `count` of N numbers, 0 for the rest; wide: all runs of N are aligned and within or outside as a whole.
template <int N> __device__ void read(const REAL* from, int count, bool wide, REAL (&x)[N]) {
  constexpr int CHUNK = chunk_of(N);
  if (wide && count >= N) {
    #pragma unroll
    for (int i = 0; i < N; i += CHUNK) {
      const auto chunk = *reinterpret_cast<const Vector<CHUNK>*>(from + i);
      #pragma unroll
      for (int j = 0; j < CHUNK; ++j) x[i + j] = chunk.of[j];
    }
  } else {
    #pragma unroll
    for (int i = 0; i < N; ++i) x[i] = i < count ? from[i] : REAL(0);
  }
}

template <int N> __device__ void write(const REAL (&x)[N], int count, bool wide, REAL* to) {
  constexpr int CHUNK = chunk_of(N);
  if (wide && count >= N) {
    #pragma unroll
    for (int i = 0; i < N; i += CHUNK) {
      Vector<CHUNK> chunk;
      #pragma unroll
      for (int j = 0; j < CHUNK; ++j) chunk.of[j] = x[i + j];
      *reinterpret_cast<Vector<CHUNK>*>(to + i) = chunk;
    }
  } else {
    #pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) to[i] = x[i];
  }
}

// ---- operands -----------------------------------------------------------------------------------------------------

// Rows of a matrix, or of the sub-tokens whose choices they carry.
struct Rows {
  const REAL* x;
  int width;
  const long long* route_R;
  int choices;  // of a sub-token: K; 0: row r is x's own

  __device__ const REAL* operator[](int r) const {
    const int row = choices ? (int)route_R[r] / choices : r;
    return x + (long long)row * width;
  }
};

// An operand whose lines are contiguous along k. A thread reads 4 terms at a time of one line. There may be more threads
// than lines: those beyond LINES must be null.
template <int LINES> struct AlongK {
  static constexpr int PER_LINE = STEP / 4, BETWEEN = THREADS / PER_LINE, QUADS = (LINES + BETWEEN - 1) / BETWEEN;
  const REAL* line[QUADS];  // null: there is none
  int K;
  bool wide;
  REAL quad[QUADS][4];

  __device__ static int line_of(int q) { return (int)threadIdx.x / PER_LINE + q * BETWEEN; }
  __device__ static int term() { return threadIdx.x % PER_LINE * 4; }

  __device__ void load(int k0) {
    #pragma unroll
    for (int q = 0; q < QUADS; ++q) {
      const int k = k0 + term();
      read(line[q] ? line[q] + k : nullptr, line[q] ? K - k : 0, wide, quad[q]);
    }
  }
  __device__ void store(Tile& tile) const {
    #pragma unroll
    for (int q = 0; q < QUADS; ++q)
      #pragma unroll
      for (int j = 0; j < 4; ++j)
        if (line_of(q) < LINES) tile[term() + j][place_of(term(), line_of(q))] = quad[q][j];
  }
};

// An operand whose terms are contiguous along lines. A thread reads 4 lines at a time of every few terms.
template <int LINES> struct AcrossK {
  static constexpr int PER_TERM = LINES / 4, TERMS = THREADS / PER_TERM, QUADS = (STEP + TERMS - 1) / TERMS;
  Rows rows;
  int first, K;  // terms are rows first .. first + K - 1
  int line0;     // the tile's first line
  bool wide;
  REAL quad[QUADS][4];

  __device__ static int line() { return threadIdx.x % PER_TERM * 4; }
  __device__ static int term_of(int q) { return (int)threadIdx.x / PER_TERM + q * TERMS; }

  __device__ void load(int k0) {
    #pragma unroll
    for (int q = 0; q < QUADS; ++q) {
      const int k = k0 + term_of(q), count = term_of(q) < STEP && k < K ? rows.width - line0 - line() : 0;
      read(count > 0 ? rows[first + k] + line0 + line() : nullptr, count, wide, quad[q]);
    }
  }
  __device__ void store(Tile& tile) const {
    #pragma unroll
    for (int q = 0; q < QUADS; ++q)
      if (TERMS * QUADS == STEP || term_of(q) < STEP)
        write(quad[q], 4, true, &tile[term_of(q)][place_of(term_of(q), line())]);
  }
};

// ---- products -----------------------------------------------------------------------------------------------------
//
// A product holds a block's tile of results. `each` hands them out as runs of RUN columns, two at a time: those from
// `column` on and those half a tile further right, so that a gate and its `up` may meet in one thread.

// By fused multiply-adds; a sum's terms are added in their order, whatever the tile.
template <int LINES> struct Fma {
  static constexpr int ROWS = LINES, RUN = SIDE / 2, HALF = ROWS / 32;
  REAL sum[2 * HALF][SIDE] = {};

  __device__ static int row_of(int i) { return i / HALF * (ROWS / 2) + (int)threadIdx.x / 16 * HALF + i % HALF; }
  __device__ static int column() { return threadIdx.x % 16 * RUN; }

  __device__ void step(const Tile& a_tile, const Tile& b_tile) {
    #pragma unroll 2  // more want registers than two blocks of a multiprocessor have
    for (int k = 0; k < STEP; ++k) {
      REAL a[2][HALF], b[2][RUN];
      #pragma unroll
      for (int half = 0; half < 2; ++half) {
        read(&a_tile[k][place_of(k, row_of(half * HALF))], HALF, true, a[half]);
        read(&b_tile[k][place_of(k, half * (TILE / 2) + column())], RUN, true, b[half]);
      }
      #pragma unroll
      for (int i = 0; i < 2 * HALF; ++i)
        #pragma unroll
        for (int j = 0; j < SIDE; ++j) sum[i][j] = fma(a[i / HALF][i % HALF], b[j / RUN][j % RUN], sum[i][j]);
    }
  }
  template <class Emit> __device__ void each(Emit emit) const {
    #pragma unroll
    for (int i = 0; i < 2 * HALF; ++i) {
      REAL left[RUN], right[RUN];
      #pragma unroll
      for (int j = 0; j < RUN; ++j) left[j] = sum[i][j], right[j] = sum[i][RUN + j];
      emit(row_of(i), column(), left, right);
    }
  }
};

#if !REAL_IS_DOUBLE && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
// To tf32's 10 bits of mantissa, halves away from zero.
__device__ unsigned tf32_of(float x) {
#ifdef __CUDACC__
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#else
  return emulator::tf32_of(x);
#endif
}

__device__ void multiply_16x8x8(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::multiply_16x8x8_tf32(d, a, b);
#endif
}

// On tensor cores, in tf32. SPLIT: x = t + rest, both in tf32, and t t' + t rest' + rest t' has about float32's accuracy.
// Warps lie 4 x 2 over the tile; each has 2 x 8 products of 16 x 8, four of the eight in either half of the columns.
template <bool SPLIT> struct TensorCores {
  static constexpr int ROWS = TILE, RUN = 2;
  float sum[2][8][4] = {};

  __device__ static int lane() { return threadIdx.x % WARP; }
  __device__ static int row0() { return (int)threadIdx.x / WARP / 2 * 32 + lane() / 4; }
  __device__ static int column0(int c) { return c / 4 * (TILE / 2) + (int)threadIdx.x / WARP % 2 * 32 + c % 4 * 8; }

  __device__ void step(const Tile& a_tile, const Tile& b_tile) {
    #pragma unroll
    for (int k0 = 0; k0 < STEP; k0 += 8) {
      unsigned a[2][4], a_rest[2][4];
      #pragma unroll
      for (int r = 0; r < 2; ++r)
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int k = k0 + q / 2 * 4, row = row0() + r * 16 + q % 2 * 8;
          split(a_tile[k + lane() % 4][place_of(k, row)], a[r][q], a_rest[r][q]);
        }
      #pragma unroll
      for (int c = 0; c < 8; ++c) {
        unsigned b[2], b_rest[2];
        #pragma unroll
        for (int q = 0; q < 2; ++q) {
          const int k = k0 + q * 4;
          split(b_tile[k + lane() % 4][place_of(k, column0(c) + lane() / 4)], b[q], b_rest[q]);
        }
        #pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (SPLIT) multiply_16x8x8(sum[r][c], a_rest[r], b);
          if (SPLIT) multiply_16x8x8(sum[r][c], a[r], b_rest);
          multiply_16x8x8(sum[r][c], a[r], b);
        }
      }
    }
  }
  __device__ static void split(float x, unsigned& t, unsigned& rest) {
    t = tf32_of(x);
    if (SPLIT) rest = tf32_of(x - __uint_as_float(t));
  }
  template <class Emit> __device__ void each(Emit emit) const {
    #pragma unroll
    for (int r = 0; r < 2; ++r)
      #pragma unroll
      for (int c = 0; c < 4; ++c)
        #pragma unroll
        for (int q = 0; q < 4; q += 2) {
          const float left[2] = {sum[r][c][q], sum[r][c][q + 1]};
          const float right[2] = {sum[r][c + 4][q], sum[r][c + 4][q + 1]};
          emit(row0() + r * 16 + q / 2 * 8, column0(c) + lane() % 4 * 2, left, right);
        }
  }
};
using Tf32 = TensorCores<false>;
using Tf32x3 = TensorCores<true>;
#else  // no tf32 here
using Tf32 = Fma<TILE>;
using Tf32x3 = Fma<TILE>;
#endif

template <class Product, class A, class B> __device__ void multiply(Product& product, A a, B b, int K) {
  Tiles& tiles = shared_tiles();
  a.load(0), b.load(0);
  a.store(tiles.a[0]), b.store(tiles.b[0]);
  __syncthreads();
  for (int k0 = 0, now = 0; k0 < K; k0 += STEP, now ^= 1) {
    const bool more = k0 + STEP < K;
    if (more) a.load(k0 + STEP), b.load(k0 + STEP);
    product.step(tiles.a[now], tiles.b[now]);
    if (more) a.store(tiles.a[now ^ 1]), b.store(tiles.b[now ^ 1]);
    __syncthreads();
  }
}

// ---- a block's tile -----------------------------------------------------------------------------------------------

// Rows first .. last - 1 of an expert; expert E: nobody's; -1: there is no such tile.
struct Segment { int expert, first, last; };

// The block's tile: `index` when each expert's rows, and then nobody's, are cut into tiles of `rows`. A warp searches.
__device__ Segment tile_of(const long long* start_Z, int E, int bound, int rows, int index) {
  __shared__ Segment found;
  if (threadIdx.x < WARP) {
    const int lane = threadIdx.x;
    for (int e0 = 0; e0 <= E && index >= 0; e0 += WARP) {
      const int e = e0 + lane;
      const int first = e <= E ? (int)start_Z[e] : 0, last = e < E ? (int)start_Z[e + 1] : e == E ? bound : 0;
      const int tiles = (last - first + rows - 1) / rows;
      int up_to = tiles;  // this expert, since e0
      for (int by = 1; by < WARP; by *= 2) {
        const int before = __shfl_up_sync(ALL_LANES, up_to, by);
        if (lane >= by) up_to += before;
      }
      const int tile = index - (up_to - tiles);
      if (0 <= tile && tile < tiles) found = {e, first + tile * rows, last};
      index -= __shfl_sync(ALL_LANES, up_to, WARP - 1);
    }
    if (index >= 0 && lane == 0) found.expert = -1;
  }
  __syncthreads();
  return found;
}

template <int LINES> __device__ AlongK<LINES> rows_along_k(Rows rows, Segment tile, bool wide) {
  AlongK<LINES> a;
  a.K = rows.width, a.wide = wide;
  #pragma unroll
  for (int q = 0; q < a.QUADS; ++q) {
    const int row = tile.first + a.line_of(q);
    a.line[q] = a.line_of(q) < LINES && row < tile.last ? rows[row] : nullptr;
  }
  return a;
}

// ---- numpy_ref.experts.expert_ffn ---------------------------------------------------------------------------------

// gate_up[r] = x[s(r)] @ w[e].T, and h[r] = act(gate) * up; s(r): the sub-token of row r. Nobody's rows become 0.
// Left of the tile's middle are columns of the gate, right of it `up`'s of the same f.
// Work 4 R U F FLOP and R F activations; moves 4 (R U + 2 E F U + 3 R F) bytes; intensity at U = 256, F = 512 and many
// rows about 70 FLOP/byte: float32 bound by arithmetic (23 FLOP/byte), tf32 by memory below U of about 400.
template <class Product>
__device__ void gate_up_tile(const REAL* x_MU, const long long* route_R, int choices, const long long* start_Z,
                             const REAL* w_E2FU, int E, int bound, int U, int F, bool silu, bool wide, REAL* gate_up_R2F,
                             REAL* h_RF) {
  constexpr int HALF = TILE / 2;
  const int columns = (F + HALF - 1) / HALF, f0 = blockIdx.x % columns * HALF;
  const Segment tile = tile_of(start_Z, E, bound, Product::ROWS, blockIdx.x / columns);
  if (tile.expert < 0) return;

  Product product;
  if (tile.expert < E) {
    AlongK<TILE> b;
    b.K = U, b.wide = wide;
    const REAL* w_2FU = w_E2FU + (long long)tile.expert * 2 * F * U;
    #pragma unroll
    for (int q = 0; q < b.QUADS; ++q) {
      const int line = b.line_of(q), f = f0 + line % HALF;
      b.line[q] = line < TILE && f < F ? w_2FU + (long long)(line / HALF * F + f) * U : nullptr;
    }
    multiply(product, rows_along_k<Product::ROWS>({x_MU, U, route_R, choices}, tile, wide), b, U);
  }
  product.each([&](int line, int column, const auto& gate, const auto& up) {
    constexpr int RUN = Product::RUN;
    const int f = f0 + column;
    const long long row = tile.first + line;
    if (row >= tile.last || f >= F) return;
    REAL h[RUN];
    #pragma unroll
    for (int j = 0; j < RUN; ++j) h[j] = gated(gate[j], up[j], silu);
    write(gate, F - f, wide, gate_up_R2F + row * 2 * F + f);
    write(up, F - f, wide, gate_up_R2F + row * 2 * F + F + f);
    write(h, F - f, wide, h_RF + row * F + f);
  });
}

// y[r] = x[r] @ w[e].T; nobody's rows are left as they are.
// Work 2 R I O FLOP; moves 4 (R I + E O I + R O) bytes; intensity at I = 512, O = 256 and many rows about 85 FLOP/byte:
// bound as the product above.
template <class Product>
__device__ void linear_tile(const REAL* x_RI, const long long* start_Z, const REAL* w_EOI, int E, int bound, int I, int O,
                            bool wide, REAL* y_RO) {
  const int columns = (O + TILE - 1) / TILE, o0 = blockIdx.x % columns * TILE;
  const Segment tile = tile_of(start_Z, E, bound, Product::ROWS, blockIdx.x / columns);
  if (tile.expert < 0 || tile.expert == E) return;

  AlongK<TILE> b;
  b.K = I, b.wide = wide;
  #pragma unroll
  for (int q = 0; q < b.QUADS; ++q) {
    const int o = o0 + b.line_of(q);
    b.line[q] = b.line_of(q) < TILE && o < O ? w_EOI + ((long long)tile.expert * O + o) * I : nullptr;
  }
  Product product;
  multiply(product, rows_along_k<Product::ROWS>({x_RI, I, nullptr, 0}, tile, wide), b, I);
  product.each([&](int line, int column, const auto& left, const auto& right) {
    const long long row = tile.first + line;
    if (row >= tile.last) return;
    const int l = o0 + column, r = l + TILE / 2;
    if (l < O) write(left, O - l, wide, y_RO + row * O + l);
    if (r < O) write(right, O - r, wide, y_RO + row * O + r);
  });
}

// ---- numpy_ref.experts.expert_ffn_backward ------------------------------------------------------------------------

// dx[r] = dy[r] @ w[e], of rows or of the sub-tokens whose rows they are (choices > 0).
// y[r,o] = sum_i x[r,i] w[e,o,i], hence dx[r,i] = sum_o dy[r,o] w[e,o,i].
// Work and bytes as `linear_tile`.
template <class Product>
__device__ void linear_backward_tile(const REAL* dy, const long long* route_R, int choices, const long long* start_Z,
                                     const REAL* w_EOI, int E, int bound, int O, int I, bool wide, REAL* dx_RI) {
  const int columns = (I + TILE - 1) / TILE, i0 = blockIdx.x % columns * TILE;
  const Segment tile = tile_of(start_Z, E, bound, Product::ROWS, blockIdx.x / columns);
  if (tile.expert < 0 || tile.expert == E) return;

  const Rows w_OI = {w_EOI + (long long)tile.expert * O * I, I, nullptr, 0};
  AcrossK<TILE> b;
  b.rows = w_OI, b.first = 0, b.K = O, b.line0 = i0, b.wide = wide;
  Product product;
  multiply(product, rows_along_k<Product::ROWS>({dy, O, route_R, choices}, tile, wide), b, O);
  product.each([&](int line, int column, const auto& left, const auto& right) {
    const long long row = tile.first + line;
    if (row >= tile.last) return;
    const int l = i0 + column, r = l + TILE / 2;
    if (l < I) write(left, I - l, wide, dx_RI + row * I + l);
    if (r < I) write(right, I - r, wide, dx_RI + row * I + r);
  });
}

// dw[e] += dy[rows of e].T @ x[rows of e]; either may be the sub-tokens' (choices > 0).
// y[r,o] = sum_i x[r,i] w[e,o,i], hence dw[e,o,i] = sum over e's rows of dy[r,o] x[r,i].
// An expert's rows are cut into `parts`, each with a block of its own, so that few experts keep many processors busy;
// with more than one, to_XEOI has a sum for each (0 for none), which `add_parts` adds in their order.
// Work 2 R O I FLOP; moves 4 (R O + R I + 2 E O I) bytes, parts apart, as long as O, I <= 128: each further tile reads
// its rows again, mostly from the L2 cache. Intensity at O, I = 128 32 FLOP/byte: float32 bound by arithmetic.
template <class Product>
__device__ void weight_gradient_tile(const REAL* dy, int dy_choices, const REAL* x, int x_choices, const long long* route_R,
                                     const long long* start_Z, int E, int O, int I, int parts, bool wide, REAL* to_XEOI) {
  const int columns = (I + TILE - 1) / TILE, lines = (O + TILE - 1) / TILE, tiles = columns * lines;
  const int o0 = blockIdx.x / columns % lines * TILE, i0 = blockIdx.x % columns * TILE;
  const int part = blockIdx.x / tiles % parts, e = blockIdx.x / tiles / parts;
  const int start = (int)start_Z[e], end = (int)start_Z[e + 1];
  const int length = ((end - start + parts - 1) / parts + STEP - 1) / STEP * STEP;
  const int first = min(start + (long long)part * length, (long long)end), rows = min(length, end - first);

  AcrossK<TILE> a, b;
  a.rows = {dy, O, route_R, dy_choices}, a.line0 = o0;
  b.rows = {x, I, route_R, x_choices}, b.line0 = i0;
  a.first = b.first = first, a.K = b.K = rows, a.wide = b.wide = wide;
  Product product;
  multiply(product, a, b, rows);

  const bool added = parts == 1;
  REAL* to_OI = to_XEOI + ((long long)part * E + e) * O * I;
  auto put = [&](int o, int i, const auto& x) {
    constexpr int RUN = Product::RUN;
    if (i >= I) return;
    REAL* to = to_OI + (long long)o * I + i;
    REAL sum[RUN];
    read(to, added ? I - i : 0, wide, sum);
    #pragma unroll
    for (int j = 0; j < RUN; ++j) sum[j] += x[j];
    write(sum, I - i, wide, to);
  };
  product.each([&](int line, int column, const auto& left, const auto& right) {
    if (o0 + line >= O) return;
    put(o0 + line, i0 + column, left);
    put(o0 + line, i0 + column + TILE / 2, right);
  });
}

// onto += the sum of the parts, in their order.
// Work parts P additions; (parts + 2) P numbers: bound by memory.
extern "C" __global__ void __launch_bounds__(256) add_parts(const REAL* part_XP, int parts, long long P, REAL* onto_P) {
  const long long p = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (p >= P) return;
  REAL sum = 0;
  for (int part = 0; part < parts; ++part) sum += part_XP[part * P + p];
  onto_P[p] += sum;
}

// ---- the kernels, for every kind of product -----------------------------------------------------------------------
//
// Two blocks fit on a multiprocessor, so that one multiplies while the other waits: at most 128 registers a thread.

extern "C" __global__ void __launch_bounds__(256, 2) gate_up(
    const REAL* x_MU, const long long* route_R, int choices, const long long* start_Z, const REAL* w_E2FU, int
    E, int bound, int U, int F, bool silu, bool wide, REAL* gate_up_R2F, REAL* h_RF) {
  gate_up_tile<Fma<TILE>>(x_MU, route_R, choices, start_Z, w_E2FU, E, bound, U, F, silu, wide, gate_up_R2F, h_RF);
}

extern "C" __global__ void __launch_bounds__(256, 2) gate_up_few(
    const REAL* x_MU, const long long* route_R, int choices, const long long* start_Z, const REAL* w_E2FU, int
    E, int bound, int U, int F, bool silu, bool wide, REAL* gate_up_R2F, REAL* h_RF) {
  gate_up_tile<Fma<FEW>>(x_MU, route_R, choices, start_Z, w_E2FU, E, bound, U, F, silu, wide, gate_up_R2F, h_RF);
}

extern "C" __global__ void __launch_bounds__(256, 2) gate_up_tf32(
    const REAL* x_MU, const long long* route_R, int choices, const long long* start_Z, const REAL* w_E2FU, int
    E, int bound, int U, int F, bool silu, bool wide, REAL* gate_up_R2F, REAL* h_RF) {
  gate_up_tile<Tf32>(x_MU, route_R, choices, start_Z, w_E2FU, E, bound, U, F, silu, wide, gate_up_R2F, h_RF);
}

extern "C" __global__ void __launch_bounds__(256, 2) gate_up_tf32x3(
    const REAL* x_MU, const long long* route_R, int choices, const long long* start_Z, const REAL* w_E2FU, int
    E, int bound, int U, int F, bool silu, bool wide, REAL* gate_up_R2F, REAL* h_RF) {
  gate_up_tile<Tf32x3>(x_MU, route_R, choices, start_Z, w_E2FU, E, bound, U, F, silu, wide, gate_up_R2F, h_RF);
}

extern "C" __global__ void __launch_bounds__(256, 2) linear(
    const REAL* x_RI, const long long* start_Z, const REAL* w_EOI, int E, int bound, int I, int O, bool wide,
    REAL* y_RO) {
  linear_tile<Fma<TILE>>(x_RI, start_Z, w_EOI, E, bound, I, O, wide, y_RO);
}

extern "C" __global__ void __launch_bounds__(256, 2) linear_few(
    const REAL* x_RI, const long long* start_Z, const REAL* w_EOI, int E, int bound, int I, int O, bool wide,
    REAL* y_RO) {
  linear_tile<Fma<FEW>>(x_RI, start_Z, w_EOI, E, bound, I, O, wide, y_RO);
}

extern "C" __global__ void __launch_bounds__(256, 2) linear_tf32(
    const REAL* x_RI, const long long* start_Z, const REAL* w_EOI, int E, int bound, int I, int O, bool wide,
    REAL* y_RO) {
  linear_tile<Tf32>(x_RI, start_Z, w_EOI, E, bound, I, O, wide, y_RO);
}

extern "C" __global__ void __launch_bounds__(256, 2) linear_tf32x3(
    const REAL* x_RI, const long long* start_Z, const REAL* w_EOI, int E, int bound, int I, int O, bool wide,
    REAL* y_RO) {
  linear_tile<Tf32x3>(x_RI, start_Z, w_EOI, E, bound, I, O, wide, y_RO);
}

extern "C" __global__ void __launch_bounds__(256, 2) linear_backward(
    const REAL* dy, const long long* route_R, int choices, const long long* start_Z, const REAL* w_EOI, int E,
    int bound, int O, int I, bool wide, REAL* dx_RI) {
  linear_backward_tile<Fma<TILE>>(dy, route_R, choices, start_Z, w_EOI, E, bound, O, I, wide, dx_RI);
}

extern "C" __global__ void __launch_bounds__(256, 2) linear_backward_few(
    const REAL* dy, const long long* route_R, int choices, const long long* start_Z, const REAL* w_EOI, int E,
    int bound, int O, int I, bool wide, REAL* dx_RI) {
  linear_backward_tile<Fma<FEW>>(dy, route_R, choices, start_Z, w_EOI, E, bound, O, I, wide, dx_RI);
}

extern "C" __global__ void __launch_bounds__(256, 2) linear_backward_tf32(
    const REAL* dy, const long long* route_R, int choices, const long long* start_Z, const REAL* w_EOI, int E,
    int bound, int O, int I, bool wide, REAL* dx_RI) {
  linear_backward_tile<Tf32>(dy, route_R, choices, start_Z, w_EOI, E, bound, O, I, wide, dx_RI);
}

extern "C" __global__ void __launch_bounds__(256, 2) linear_backward_tf32x3(
    const REAL* dy, const long long* route_R, int choices, const long long* start_Z, const REAL* w_EOI, int E,
    int bound, int O, int I, bool wide, REAL* dx_RI) {
  linear_backward_tile<Tf32x3>(dy, route_R, choices, start_Z, w_EOI, E, bound, O, I, wide, dx_RI);
}

extern "C" __global__ void __launch_bounds__(256, 2) weight_gradient(
    const REAL* dy, int dy_choices, const REAL* x, int x_choices, const long long* route_R, const long long*
    start_Z, int E, int O, int I, int parts, bool wide, REAL* to_XEOI) {
  weight_gradient_tile<Fma<TILE>>(dy, dy_choices, x, x_choices, route_R, start_Z, E, O, I, parts, wide, to_XEOI);
}

extern "C" __global__ void __launch_bounds__(256, 2) weight_gradient_tf32(
    const REAL* dy, int dy_choices, const REAL* x, int x_choices, const long long* route_R, const long long*
    start_Z, int E, int O, int I, int parts, bool wide, REAL* to_XEOI) {
  weight_gradient_tile<Tf32>(dy, dy_choices, x, x_choices, route_R, start_Z, E, O, I, parts, wide, to_XEOI);
}

extern "C" __global__ void __launch_bounds__(256, 2) weight_gradient_tf32x3(
    const REAL* dy, int dy_choices, const REAL* x, int x_choices, const long long* route_R, const long long*
    start_Z, int E, int O, int I, int parts, bool wide, REAL* to_XEOI) {
  weight_gradient_tile<Tf32x3>(dy, dy_choices, x, x_choices, route_R, start_Z, E, O, I, parts, wide, to_XEOI);
}
