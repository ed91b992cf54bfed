// Causal attention with grouped key/value heads: no array of T x T, but tiles of it in registers [FlashAttention].
//
// A block is 16 x 16 threads and owns a tile of rows (queries; for dk and dv keys). A thread has 1 to 8 of the tile's
// rows (y, y + 16, ..), and of a tile of scores the 4 columns x, x + 16, ..: so a row's maximum and sum are those of
// 16 neighbouring lanes. The two kinds of products, of rows with rows (scores) and of scores with rows (sums), take
// their operands through shared memory in pieces, so the head's width costs registers alone. It is compiled for widths
// 32, 64, 128 and 256, the places beyond C holding 0. Products are fused, in the order of their index.

constexpr int LANES = 16, THREADS = LANES * LANES;
constexpr int COLUMNS = 4, TILE = COLUMNS * LANES;  // a thread's and a block's columns of scores
constexpr int STEP = 32;                            // places of the width that a product of rows takes at a time
constexpr int VECTOR = 16 / sizeof(REAL);           // numbers of one load of 16 bytes
constexpr int PAD = VECTOR;                         // so that eight neighbouring rows lie in different banks
constexpr int SPLIT = 2 * TILE;                     // positions of a cache that one block attends to

// A thread's rows of a tile: eight where the registers allow two blocks on a multiprocessor, else four; of double half.
template <int WIDTH> constexpr int FORWARD_ROWS = (WIDTH == 64 ? 8 : 4) / (REAL_IS_DOUBLE ? 2 : 1);
constexpr int BACKWARD_ROWS = REAL_IS_DOUBLE ? 2 : 4;
constexpr int BLOCKS = REAL_IS_DOUBLE ? 1 : 2;  // on a multiprocessor: of float 128 registers a thread

struct alignas(16) Vector { REAL at[VECTOR]; };
__device__ const Vector& vector_at(const REAL* place) { return *reinterpret_cast<const Vector*>(place); }

__device__ REAL infinity() {
  return REAL_IS_DOUBLE ? (REAL)__longlong_as_double(0x7FF0000000000000LL) : (REAL)__int_as_float(0x7F800000);
}

__device__ int lane() { return threadIdx.x % LANES; }                     // x: its columns are lane() + LANES * j
__device__ int row_of(int i) { return threadIdx.x / LANES + LANES * i; }  // of the tile, for a thread's row i

// The 16 lanes that share a row: their sum, and their largest (NaN if any is one).
__device__ REAL sum_of_row(REAL x) {
  for (int bits = LANES / 2; bits; bits >>= 1) x += __shfl_xor_sync(ALL_LANES, x, bits);
  return x;
}
__device__ REAL largest_of_row(REAL x) {
  for (int bits = LANES / 2; bits; bits >>= 1) x = larger(x, __shfl_xor_sync(ALL_LANES, x, bits));
  return x;
}

// Rows of one head, row i at first + i * step; from row `count` on they count as 0. A tile of them lies within 2^31.
struct Rows {
  const REAL* first;
  int step, count, width;
  bool aligned;  // whether all rows may be read 16 bytes at a time
};
__device__ Rows rows_from(const Rows& rows, int row) {
  return {rows.first + (long long)row * rows.step, rows.step, rows.count - row, rows.width, rows.aligned};
}

// What a block's shared memory holds in turn: pieces of two tiles of rows, or a tile of weights and rows to be summed.
template <int WIDTH, int ROWS> struct alignas(16) Room {
  static constexpr int DEPTH = 8192 / (int)sizeof(REAL) / WIDTH;
  union {
    struct { REAL left[ROWS * LANES][STEP + PAD], right[TILE][STEP + PAD]; };
    struct { REAL weight[ROWS * LANES][TILE + PAD], row[DEPTH][WIDTH]; };
  };
};

// to = `count` rows by `places` places, from `place` on.
template <int COUNT, int PLACES, int STRIDE> __device__ void load(const Rows& rows, int place, REAL (*to)[STRIDE]) {
  if (rows.aligned) {
    #pragma unroll
    for (int i = 0; i < COUNT * PLACES / VECTOR; i += THREADS) {
      const int part = i + threadIdx.x, row = part / (PLACES / VECTOR), c = part % (PLACES / VECTOR) * VECTOR;
      if (COUNT * PLACES / VECTOR % THREADS && part >= COUNT * PLACES / VECTOR) break;
      Vector x = {};
      if (row < rows.count && place + c < rows.width) x = vector_at(rows.first + row * rows.step + place + c);
      *reinterpret_cast<Vector*>(&to[row][c]) = x;
    }
  } else {
    #pragma unroll 1
    for (int i = 0; i < COUNT * PLACES; i += THREADS) {
      const int row = (i + threadIdx.x) / PLACES, c = (i + threadIdx.x) % PLACES;
      to[row][c] = row < rows.count && place + c < rows.width ? rows.first[row * rows.step + place + c] : 0;
    }
  }
}

// product = left right^T for the block's rows and TILE columns.
template <int WIDTH, int ROWS>
__device__ void multiply(const Rows& left, const Rows& right, Room<WIDTH, ROWS>& room, REAL (&product)[ROWS][COLUMNS]) {
  #pragma unroll
  for (int i = 0; i < ROWS; ++i)
    #pragma unroll
    for (int j = 0; j < COLUMNS; ++j) product[i][j] = 0;
  #pragma unroll 1
  for (int place = 0; place < left.width; place += STEP) {
    __syncthreads();
    load<ROWS * LANES, STEP>(left, place, room.left);
    load<TILE, STEP>(right, place, room.right);
    __syncthreads();
    const int places = min(STEP, left.width - place);
    #pragma unroll 1
    for (int c = 0; c < places; c += VECTOR) {
      Vector y[COLUMNS];
      #pragma unroll
      for (int j = 0; j < COLUMNS; ++j) y[j] = vector_at(&room.right[lane() + LANES * j][c]);
      #pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const Vector x = vector_at(&room.left[row_of(i)][c]);
        #pragma unroll
        for (int v = 0; v < VECTOR; ++v)
          #pragma unroll
          for (int j = 0; j < COLUMNS; ++j) product[i][j] = fma(x.at[v], y[j].at[v], product[i][j]);
      }
    }
  }
  __syncthreads();  // the room is free
}

// A thread's places of the width: WIDTH / LANES of them, neighbours by up to a vector.
template <int WIDTH> constexpr int PLACES = WIDTH / LANES;
template <int WIDTH> constexpr int NEIGHBOURS = PLACES<WIDTH> < VECTOR ? PLACES<WIDTH> : VECTOR;
template <int WIDTH> __device__ int place_of(int q) {
  return (q / NEIGHBOURS<WIDTH> * LANES + lane()) * NEIGHBOURS<WIDTH> + q % NEIGHBOURS<WIDTH>;
}
template <int N> struct alignas(N * sizeof(REAL)) Neighbours { REAL at[N]; };

// sum += weight rows, where the block's threads have just written room.weight.
template <int WIDTH, int ROWS>
__device__ void accumulate(const Rows& rows, Room<WIDTH, ROWS>& room, REAL (&sum)[ROWS][PLACES<WIDTH>]) {
  constexpr int DEPTH = Room<WIDTH, ROWS>::DEPTH, N = NEIGHBOURS<WIDTH>;
  #pragma unroll 1
  for (int first = 0; first < TILE && first < rows.count; first += DEPTH) {
    __syncthreads();
    load<DEPTH, WIDTH>(rows_from(rows, first), 0, room.row);
    __syncthreads();
    #pragma unroll 1
    for (int s = 0; s < DEPTH; s += VECTOR) {
      #pragma unroll
      for (int q = 0; q < PLACES<WIDTH>; q += N) {
        Neighbours<N> y[VECTOR];
        #pragma unroll
        for (int v = 0; v < VECTOR; ++v)
          y[v] = *reinterpret_cast<const Neighbours<N>*>(&room.row[s + v][place_of<WIDTH>(q)]);
        #pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          const Vector weight = vector_at(&room.weight[row_of(i)][first + s]);
          #pragma unroll
          for (int v = 0; v < VECTOR; ++v)
            #pragma unroll
            for (int n = 0; n < N; ++n) sum[i][q + n] = fma(weight.at[v], y[v].at[n], sum[i][q + n]);
        }
      }
    }
  }
  __syncthreads();  // the room is free
}

template <int ROWS> __device__ void write_weights(const REAL (&score)[ROWS][COLUMNS], REAL (*weight)[TILE + PAD]) {
  #pragma unroll
  for (int i = 0; i < ROWS; ++i)
    #pragma unroll
    for (int j = 0; j < COLUMNS; ++j) weight[row_of(i)][lane() + LANES * j] = score[i][j];
}

// One head's rows of a tile, written where there are any.
template <int WIDTH, int ROWS>
__device__ void write_rows(const REAL (&sum)[ROWS][PLACES<WIDTH>], REAL* to, int step, int count, int C) {
  #pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    if (row_of(i) >= count) continue;
    #pragma unroll
    for (int q = 0; q < PLACES<WIDTH>; ++q)
      if (place_of<WIDTH>(q) < C) to[(long long)row_of(i) * step + place_of<WIDTH>(q)] = sum[i][q];
  }
}

// A view [B, T, heads, C] as a kernel's parameters: its memory and its steps by sequence, position and head.
#define VIEW(x) const REAL *x, long long x##_b, int x##_t, int x##_head
#define WRITTEN_VIEW(x) REAL *x, long long x##_b, int x##_t, int x##_head
#define STEPS(x) x, x##_b, x##_t, x##_head

// ---- forward -----------------------------------------------------------------------------------------------------

// A softmax on its way: of each row the largest score, the sum of e^(score - largest) over the thread's own columns,
// and the sum of those times the values.
template <int WIDTH, int ROWS> struct Softmax { REAL largest[ROWS], total[ROWS], sum[ROWS][PLACES<WIDTH>]; };

// Attend to the keys from `begin` to before `end`; row i sees those before seen + i * seen_more.
// With m the largest score so far, that of a new tile m', a row's sums turn into sum e^(m - m') + e^(score - m') v.
template <int WIDTH, int ROWS>
__device__ void attend(const Rows& queries, const Rows& keys, const Rows& values, int begin, int end, int seen,
                       int seen_more, REAL scale, Room<WIDTH, ROWS>& room, Softmax<WIDTH, ROWS>& softmax) {
  REAL score[ROWS][COLUMNS];
  #pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    softmax.largest[i] = -infinity(), softmax.total[i] = 0;
    #pragma unroll
    for (int q = 0; q < PLACES<WIDTH>; ++q) softmax.sum[i][q] = 0;
  }
  #pragma unroll 1
  for (int first = begin; first < end; first += TILE) {
    multiply(queries, rows_from(keys, first), room, score);
    #pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int before = min(end, seen + row_of(i) * seen_more);
      REAL largest = softmax.largest[i];
      #pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        score[i][j] = first + lane() + LANES * j < before ? score[i][j] * scale : -infinity();
        largest = larger(score[i][j], largest);
      }
      largest = largest_of_row(largest);
      // While all scores are -inf none weighs anything; e^(-inf + inf) would be NaN.
      const REAL base = largest == -infinity() ? 0 : largest, shrink = exp(softmax.largest[i] - base);
      softmax.largest[i] = largest;
      softmax.total[i] *= shrink;
      #pragma unroll
      for (int q = 0; q < PLACES<WIDTH>; ++q) softmax.sum[i][q] *= shrink;
      #pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        score[i][j] = exp(score[i][j] - base);
        softmax.total[i] += score[i][j];
      }
    }
    write_weights(score, room.weight);
    accumulate(rows_from(values, first), room, softmax.sum);
  }
  #pragma unroll
  for (int i = 0; i < ROWS; ++i) softmax.total[i] = sum_of_row(softmax.total[i]);
}

// numpy_ref.attention.attention: out = softmax(q k^T / sqrt(C)) v over the S - T + t + 1 keys that query t sees, and
// log-sum-exp. A block is a head and a tile of its queries, those that see the most coming first.
// Work 4 C FLOP and an exponential for each query and key seen, 2 B A C T (T + 1) FLOP when S = T; moves
// 4 B C (2 T A + 2 S G) bytes, but each block reads its queries, keys and values for each tile of keys anew (from the
// L2 cache: 21 to 32 FLOP a byte). Intensity T / 4 FLOP a byte and more: bound by arithmetic, of float32 without tensor cores.
template <int WIDTH, int ROWS>
__device__ void attention_of_block(VIEW(q_BTAC), VIEW(k_BSGC), VIEW(v_BSGC), REAL* out_BTAC, REAL* log_sum_exp_BAT,
                                   int B, int T, int S, int A, int G, int C, bool aligned, REAL scale,
                                   Room<WIDTH, ROWS>& room) {
  const int heads = B * A, b = blockIdx.x % heads / A, a = blockIdx.x % A, g = a / (A / G);
  const int first = (gridDim.x / heads - 1 - blockIdx.x / heads) * ROWS * LANES, count = min(ROWS * LANES, T - first);
  const Rows queries = {q_BTAC + b * q_BTAC_b + first * (long long)q_BTAC_t + a * q_BTAC_head, q_BTAC_t, count, C, aligned};
  const int seen = S - T + first + 1, end = seen + count - 1;
  const Rows keys = {k_BSGC + b * k_BSGC_b + g * k_BSGC_head, k_BSGC_t, end, C, aligned};
  const Rows values = {v_BSGC + b * v_BSGC_b + g * v_BSGC_head, v_BSGC_t, end, C, aligned};
  Softmax<WIDTH, ROWS> softmax;
  attend(queries, keys, values, 0, end, seen, 1, scale, room, softmax);
  #pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const REAL total = softmax.total[i], highest = softmax.largest[i];
    if (log_sum_exp_BAT && lane() == 0 && row_of(i) < count) {
      // Where all scores are -inf the mean is 0/0, and so is this.
      log_sum_exp_BAT[((long long)b * A + a) * T + first + row_of(i)] = highest + log(total) + 0 * total / total;
    }
    #pragma unroll
    for (int q = 0; q < PLACES<WIDTH>; ++q) softmax.sum[i][q] /= total;
  }
  const int step = A * C;
  write_rows<WIDTH>(softmax.sum, out_BTAC + ((long long)b * T + first) * step + a * C, step, count, C);
}

#define ATTENTION_PARAMETERS                                                                                        \
  VIEW(q_BTAC), VIEW(k_BSGC), VIEW(v_BSGC), REAL *out_BTAC, REAL *log_sum_exp_BAT, int B, int T, int S, int A, int G, \
      int C, bool aligned, REAL scale
#define ATTENTION(WIDTH)                                                                                              \
  __shared__ Room<WIDTH, FORWARD_ROWS<WIDTH>> room;                                                                          \
  attention_of_block(STEPS(q_BTAC), STEPS(k_BSGC), STEPS(v_BSGC), out_BTAC, log_sum_exp_BAT, B, T, S, A, G, C, aligned, \
                     scale, room)

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_32(ATTENTION_PARAMETERS) { ATTENTION(32); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_64(ATTENTION_PARAMETERS) { ATTENTION(64); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_128(ATTENTION_PARAMETERS) { ATTENTION(128); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_256(ATTENTION_PARAMETERS) { ATTENTION(256); }

// ---- backward ----------------------------------------------------------------------------------------------------
//
// numpy_ref.attention.attention_backward. out = p v with p = softmax(s), s = q k^T c, c = C^(-1/2). Per head:
// dv = p^T dout; dp = dout v^T; ds = p (dp - dot) with dot = sum_s(dp p) = dout . out; dq = c ds k; dk = c ds^T q.
// p = e^(s - log-sum-exp) is computed again, in both kernels: one owns rows of dq, the other rows of dk and dv, so
// nobody adds to what another block writes and every sum has one order.

// dot_BAT = sum over C of dout out. A warp has a row. Work 2 B T A C FLOP, 8 B T A C bytes: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_dots(const REAL* dout_BTAC, const REAL* out_BTAC, int B, int T, int A, int C, REAL* dot_BAT) {
  const long long row = (long long)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
  if (row >= (long long)B * T * A) return;
  REAL dot = 0;
  for (int c = threadIdx.x % WARP; c < C; c += WARP) dot = fma(dout_BTAC[row * C + c], out_BTAC[row * C + c], dot);
  dot = sum_of_lanes(dot);
  const int a = row % A, t = row / A % T, b = row / A / T;
  if (threadIdx.x % WARP == 0) dot_BAT[((long long)b * A + a) * T + t] = dot;
}

// Where in the scores a thread's entry lies: rows are queries and columns keys or, TURNED, the other way.
struct Entry { int query, key; };
template <bool TURNED> __device__ Entry entry(int first_row, int first_column, int i, int j) {
  const int row = first_row + row_of(i), column = first_column + lane() + LANES * j;
  if (TURNED) return {column, row};
  return {row, column};
}

// Turns q k^T into p = e^(s - log-sum-exp), 0 where a query does not see the key.
template <bool TURNED, int ROWS>
__device__ void probabilities(int first_row, int first_column, int T, const REAL* log_sum_exp_BAT, long long row, REAL scale,
                              REAL (&p)[ROWS][COLUMNS]) {
  #pragma unroll
  for (int i = 0; i < ROWS; ++i)
    #pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const auto at = entry<TURNED>(first_row, first_column, i, j);
      const bool seen = at.key <= at.query && at.query < T;
      p[i][j] = seen ? exp(p[i][j] * scale - log_sum_exp_BAT[row + at.query]) : 0;
    }
}

// Turns dp into c ds = c p (dp - dot), 0 where a query does not see the key.
template <bool TURNED, int ROWS>
__device__ void score_gradients(int first_row, int first_column, int T, const REAL* dot_BAT, long long row, REAL scale,
                                const REAL (&p)[ROWS][COLUMNS], REAL (&dp)[ROWS][COLUMNS]) {
  #pragma unroll
  for (int i = 0; i < ROWS; ++i)
    #pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const auto at = entry<TURNED>(first_row, first_column, i, j);
      const bool seen = at.key <= at.query && at.query < T;
      dp[i][j] = seen ? p[i][j] * (dp[i][j] - dot_BAT[row + at.query]) * scale : 0;
    }
}

#define BACKWARD_PARAMETERS                                                                                         \
  VIEW(q_BTAC), VIEW(k_BTGC), VIEW(v_BTGC), const REAL *dout_BTAC, const REAL *log_sum_exp_BAT, const REAL *dot_BAT, \
      int B, int T, int A, int G, int C, bool aligned, REAL scale
#define BACKWARD_ARGUMENTS \
  STEPS(q_BTAC), STEPS(k_BTGC), STEPS(v_BTGC), dout_BTAC, log_sum_exp_BAT, dot_BAT, B, T, A, G, C, aligned, scale

// dq: three products for each tile of keys. A block is a head and a tile of its queries.
// Work 6 C FLOP and an exponential for each query and key seen, 3 B A C T (T + 1) FLOP; moves
// 4 B T C (3 A + 2 G) bytes: bound by arithmetic.
template <int WIDTH, int ROWS>
__device__ void query_gradient(BACKWARD_PARAMETERS, WRITTEN_VIEW(dq_BTAC), Room<WIDTH, ROWS>& room) {
  const int heads = B * A, b = blockIdx.x % heads / A, a = blockIdx.x % A, g = a / (A / G);
  const int first = (gridDim.x / heads - 1 - blockIdx.x / heads) * ROWS * LANES, count = min(ROWS * LANES, T - first);
  const long long row = ((long long)b * A + a) * T;
  const int step = A * C;
  const Rows queries = {q_BTAC + b * q_BTAC_b + first * (long long)q_BTAC_t + a * q_BTAC_head, q_BTAC_t, count, C, aligned};
  const Rows dout = {dout_BTAC + ((long long)b * T + first) * step + a * C, step, count, C, aligned};
  const Rows keys = {k_BTGC + b * k_BTGC_b + g * k_BTGC_head, k_BTGC_t, first + count, C, aligned};
  const Rows values = {v_BTGC + b * v_BTGC_b + g * v_BTGC_head, v_BTGC_t, first + count, C, aligned};
  REAL p[ROWS][COLUMNS], ds[ROWS][COLUMNS], dq[ROWS][PLACES<WIDTH>] = {};
  #pragma unroll 1
  for (int key = 0; key < first + count; key += TILE) {
    multiply(queries, rows_from(keys, key), room, p);
    probabilities<false>(first, key, T, log_sum_exp_BAT, row, scale, p);
    multiply(dout, rows_from(values, key), room, ds);
    score_gradients<false>(first, key, T, dot_BAT, row, scale, p, ds);
    write_weights(ds, room.weight);
    accumulate(rows_from(keys, key), room, dq);
  }
  write_rows<WIDTH>(dq, dq_BTAC + b * dq_BTAC_b + first * (long long)dq_BTAC_t + a * dq_BTAC_head, dq_BTAC_t, count, C);
}

// dk and dv: four products for each tile of queries, of each attention head of the group in order. A block is a
// key/value head and a tile of its keys. Work 8 C FLOP and an exponential for each query and key seen,
// 4 B A C T (T + 1) FLOP; moves 4 B T C (2 A + 4 G) bytes: bound by arithmetic.
// `kept` holds p while dp is computed, for want of registers.
template <int WIDTH, int ROWS>
__device__ void key_value_gradient(BACKWARD_PARAMETERS, WRITTEN_VIEW(dk_BTGC), WRITTEN_VIEW(dv_BTGC),
                                   Room<WIDTH, ROWS>& room, REAL (*kept)[THREADS]) {
  const int heads = B * G, b = blockIdx.x % heads / G, g = blockIdx.x % G;
  const int first = blockIdx.x / heads * ROWS * LANES, count = min(ROWS * LANES, T - first);
  const int step = A * C;
  const Rows keys = {k_BTGC + b * k_BTGC_b + first * (long long)k_BTGC_t + g * k_BTGC_head, k_BTGC_t, count, C, aligned};
  const Rows values = {v_BTGC + b * v_BTGC_b + first * (long long)v_BTGC_t + g * v_BTGC_head, v_BTGC_t, count, C, aligned};
  REAL p[ROWS][COLUMNS], ds[ROWS][COLUMNS], dk[ROWS][PLACES<WIDTH>] = {}, dv[ROWS][PLACES<WIDTH>] = {};
  for (int a = g * (A / G); a < (g + 1) * (A / G); ++a) {
    const long long row = ((long long)b * A + a) * T;
    const Rows queries = {q_BTAC + b * q_BTAC_b + a * q_BTAC_head, q_BTAC_t, T, C, aligned};
    const Rows dout = {dout_BTAC + (long long)b * T * step + a * C, step, T, C, aligned};
    #pragma unroll 1
    for (int query = first; query < T; query += TILE) {
      multiply(keys, rows_from(queries, query), room, p);
      probabilities<true>(first, query, T, log_sum_exp_BAT, row, scale, p);
      write_weights(p, room.weight);
      #pragma unroll
      for (int e = 0; e < ROWS * COLUMNS; ++e) kept[e][threadIdx.x] = p[e / COLUMNS][e % COLUMNS];
      accumulate(rows_from(dout, query), room, dv);
      multiply(values, rows_from(dout, query), room, ds);
      #pragma unroll
      for (int e = 0; e < ROWS * COLUMNS; ++e) p[e / COLUMNS][e % COLUMNS] = kept[e][threadIdx.x];
      score_gradients<true>(first, query, T, dot_BAT, row, scale, p, ds);
      write_weights(ds, room.weight);
      accumulate(rows_from(queries, query), room, dk);
    }
  }
  write_rows<WIDTH>(dk, dk_BTGC + b * dk_BTGC_b + first * (long long)dk_BTGC_t + g * dk_BTGC_head, dk_BTGC_t, count, C);
  write_rows<WIDTH>(dv, dv_BTGC + b * dv_BTGC_b + first * (long long)dv_BTGC_t + g * dv_BTGC_head, dv_BTGC_t, count, C);
}

#define DQ_PARAMETERS BACKWARD_PARAMETERS, WRITTEN_VIEW(dq_BTAC)
#define DQ(WIDTH)                                \
  __shared__ Room<WIDTH, BACKWARD_ROWS> room; \
  query_gradient(BACKWARD_ARGUMENTS, STEPS(dq_BTAC), room)
#define DKV_PARAMETERS BACKWARD_PARAMETERS, WRITTEN_VIEW(dk_BTGC), WRITTEN_VIEW(dv_BTGC)
#define DKV(WIDTH)                                            \
  __shared__ REAL kept[BACKWARD_ROWS * COLUMNS][THREADS];      \
  __shared__ Room<WIDTH, BACKWARD_ROWS> room; \
  key_value_gradient(BACKWARD_ARGUMENTS, STEPS(dk_BTGC), STEPS(dv_BTGC), room, kept)

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) query_gradient_32(DQ_PARAMETERS) { DQ(32); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) query_gradient_64(DQ_PARAMETERS) { DQ(64); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) query_gradient_128(DQ_PARAMETERS) { DQ(128); }
extern "C" __global__ void __launch_bounds__(THREADS) query_gradient_256(DQ_PARAMETERS) { DQ(256); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) key_value_gradient_32(DKV_PARAMETERS) { DKV(32); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) key_value_gradient_64(DKV_PARAMETERS) { DKV(64); }
extern "C" __global__ void __launch_bounds__(THREADS) key_value_gradient_128(DKV_PARAMETERS) { DKV(128); }
extern "C" __global__ void __launch_bounds__(THREADS) key_value_gradient_256(DKV_PARAMETERS) { DKV(256); }

// ---- with a key-value cache --------------------------------------------------------------------------------------
//
// numpy_ref.attention.attention_with_cache. How many positions are filled is read on the device; grids are for S.

// k and v go to the cache's positions from filled on. A block is a token. Moves 16 B T G C bytes: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    write_cache(VIEW(k_BTGC), VIEW(v_BTGC), REAL* kv_BS2GC, const long long* filled_1, int T, int S, int G, int C) {
  const int b = blockIdx.x / T, t = blockIdx.x % T;
  const long long position = filled_1[0] + t;
  if (position >= S) return;
  REAL* kv_2GC = kv_BS2GC + (b * (long long)S + position) * 2 * G * C;
  const REAL *k_GC = k_BTGC + b * k_BTGC_b + t * (long long)k_BTGC_t, *v_GC = v_BTGC + b * v_BTGC_b + t * (long long)v_BTGC_t;
  for (int i = threadIdx.x; i < G * C; i += THREADS) {
    const int g = i / C, c = i % C;
    kv_2GC[i] = k_GC[g * k_BTGC_head + c];
    kv_2GC[G * C + i] = v_GC[g * v_BTGC_head + c];
  }
}

#define CACHE_PARAMETERS VIEW(q_BTAC), const REAL *kv_BS2GC, const long long *filled_1
#define CACHE_SIZES int S, int A, int G, int C, bool aligned, REAL scale

// T queries to the filled + T positions: as `attention`, the cache's heads being views.
#define CACHED_PARAMETERS CACHE_PARAMETERS, REAL *out_BTAC, int B, int T, CACHE_SIZES
#define CACHED(WIDTH)                                                                                           \
  __shared__ Room<WIDTH, FORWARD_ROWS<WIDTH>> room;                                                                    \
  const int position = 2 * G * C;                                                                               \
  attention_of_block(STEPS(q_BTAC), kv_BS2GC, (long long)S * position, position, C, kv_BS2GC + G * C, (long long)S * position, position, \
                     C, out_BTAC, nullptr, B, T, (int)filled_1[0] + T, A, G, C, aligned, scale, room)

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) cached_attention_32(CACHED_PARAMETERS) { CACHED(32); }
extern "C" __global__ void __launch_bounds__(THREADS) cached_attention_64(CACHED_PARAMETERS) { CACHED(64); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) cached_attention_128(CACHED_PARAMETERS) { CACHED(128); }
extern "C" __global__ void __launch_bounds__(THREADS) cached_attention_256(CACHED_PARAMETERS) { CACHED(256); }

// One query a sequence, T = 1. A tile's rows are the attention heads of a group, so that the cache is read once for all
// of them; a block takes SPLIT positions, and what it finds is a part: for each head the sums over its positions of
// e^(score - largest) v, the largest score and the sum of e^(score - largest). Blocks of positions that are not filled
// end at once, without a part. A part depends on its positions alone, whatever S and the number of positions filled.
// Work 4 S A C FLOP a sequence (of 16 heads a group, where there are fewer); moves 8 S G C bytes: intensity A / (2 G)
// FLOP a byte: bound by memory.
template <int WIDTH>
__device__ void attention_step(CACHE_PARAMETERS, REAL* parts, int splits, CACHE_SIZES, Room<WIDTH, 1>& room) {
  const int group = A / G, sixteens = (group + LANES - 1) / LANES, all = gridDim.x / splits;
  const int split = blockIdx.x / all, rest = blockIdx.x % all, g = rest % G, part_of_group = rest / G % sixteens;
  const int b = rest / G / sixteens, a = g * group + part_of_group * LANES;
  const int filled = min(S, (int)filled_1[0] + 1), begin = split * SPLIT, end = min(filled, begin + SPLIT);
  if (begin >= filled) return;
  const int count = min(LANES, (g + 1) * group - a), position = 2 * G * C;
  const REAL* kv_S2GC = kv_BS2GC + b * (long long)S * position + g * C;
  const Rows queries = {q_BTAC + b * q_BTAC_b + a * q_BTAC_head, q_BTAC_head, count, C, aligned};
  const Rows keys = {kv_S2GC, position, end, C, aligned}, values = {kv_S2GC + G * C, position, end, C, aligned};
  Softmax<WIDTH, 1> softmax;
  attend(queries, keys, values, begin, end, end, 0, scale, room, softmax);
  const int step = splits * (C + 2);  // from one head's part to the next head's
  REAL* part = parts + (b * (long long)A + a) * step + split * (C + 2);
  write_rows<WIDTH>(softmax.sum, part, step, count, C);
  if (lane() == 0 && row_of(0) < count) {
    part[(long long)row_of(0) * step + C] = softmax.largest[0];
    part[(long long)row_of(0) * step + C + 1] = softmax.total[0];
  }
}

#define STEP_PARAMETERS CACHE_PARAMETERS, REAL *parts, int splits, CACHE_SIZES
#define ATTENTION_STEP(WIDTH)    \
  __shared__ Room<WIDTH, 1> room; \
  attention_step(STEPS(q_BTAC), kv_BS2GC, filled_1, parts, splits, S, A, G, C, aligned, scale, room)

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_step_32(STEP_PARAMETERS) { ATTENTION_STEP(32); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_step_64(STEP_PARAMETERS) { ATTENTION_STEP(64); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_step_128(STEP_PARAMETERS) { ATTENTION_STEP(128); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_step_256(STEP_PARAMETERS) { ATTENTION_STEP(256); }

// out = sum_i e^(m_i - m) sums_i / sum_i e^(m_i - m) total_i over the parts in order, m their largest score. A block is
// a head. Moves 4 B A C S / SPLIT bytes: bound by a launch.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_step_end(const REAL* parts, const long long* filled_1, int splits, int S, int C, REAL* out_BTAC) {
  const int there = (min(S, (int)filled_1[0] + 1) + SPLIT - 1) / SPLIT;
  const REAL* part = parts + blockIdx.x * (long long)splits * (C + 2);
  REAL largest = -infinity(), total = 0;
  for (int i = 0; i < there; ++i) largest = larger(part[i * (C + 2) + C], largest);
  const REAL base = largest == -infinity() ? 0 : largest;
  for (int i = 0; i < there; ++i) total += exp(part[i * (C + 2) + C] - base) * part[i * (C + 2) + C + 1];
  for (int c = threadIdx.x; c < C; c += THREADS) {
    REAL sum = 0;
    for (int i = 0; i < there; ++i) sum += exp(part[i * (C + 2) + C] - base) * part[i * (C + 2) + c];
    out_BTAC[(long long)blockIdx.x * C + c] = sum / total;
  }
}
