// BitNet's activations: rows in 8 bits, and what a BitLinear's rows and weights act as.
//
// Everything rounds as the definition writes it, so the bits are the same. That CuPy flushes float32's subnormal
// numbers to zero does not show: gamma/127 and 127/gamma are normal, and what is flushed rounds to 0 of its own sign.
//
// A row belongs to one warp, 8 rows to a block; or, where rows are long, to a whole block. blockDim.x says which.

constexpr int THREADS = 256;

__device__ int row_of_thread() { return blockIdx.x * blockDim.y + threadIdx.y; }

// The largest over a row, NaN if one is.
__device__ REAL largest_of_row(REAL x, REAL* room) {
  x = largest_of_lanes(x);
  if (blockDim.x == WARP) return x;
  if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
  __syncthreads();
  for (int warp = 0; warp < (int)blockDim.x / WARP; ++warp) x = larger(x, room[warp]);
  return x;
}

__device__ int sum_of_row(int x, int* room) { return blockDim.x == WARP ? sum_of_lanes(x) : sum_of_block(x, room); }

// gamma = max(max |x|, 1e-5) of one row: numpy_ref.quantise.quantise_rows.
__device__ REAL gamma_of_row(const REAL* x_I, int I, REAL* room) {
  REAL gamma = 0;
  for (int i = threadIdx.x; i < I; i += blockDim.x) gamma = larger(gamma, (REAL)fabs(x_I[i]));
  return larger(largest_of_row(gamma, room), (REAL)1e-5);
}

// numpy_ref.quantise.quantise_rows: q = round(x * (127/gamma)), scale = gamma/127. The clip never acts: the product
// stays below 127.5 whatever the roundings.
// Work 2 N I; 3 N I numbers (a row's second reading comes from the nearest cache): bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) quantise_rows(const REAL* x_NI, int N, int I, REAL* q_NI,
                                                                    REAL* scale_N) {
  __shared__ REAL room[WARP];
  const int n = row_of_thread();
  if (n >= N) return;
  const REAL* x_I = x_NI + (long long)n * I;
  REAL* q_I = q_NI + (long long)n * I;
  const REAL gamma = gamma_of_row(x_I, I, room), inverse = (REAL)127 / gamma;
  for (int i = threadIdx.x; i < I; i += blockDim.x) q_I[i] = rint(x_I[i] * inverse);
  if (threadIdx.x == 0) scale_N[n] = gamma / (REAL)127;
}

// numpy_ref.quantise.straight_through, a linear map's input as its backward sees it: x_hat = q gamma/127.
// Work 3 N I; 2 N I numbers: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) act_as_quantised(const REAL* x_NI, int N, int I,
                                                                       REAL* x_hat_NI) {
  __shared__ REAL room[WARP];
  const int n = row_of_thread();
  if (n >= N) return;
  const REAL* x_I = x_NI + (long long)n * I;
  REAL* x_hat_I = x_hat_NI + (long long)n * I;
  const REAL gamma = gamma_of_row(x_I, I, room), inverse = (REAL)127 / gamma, scale = gamma / (REAL)127;
  for (int i = threadIdx.x; i < I; i += blockDim.x) x_hat_I[i] = rint(x_I[i] * inverse) * scale;
}

// numpy_ref.quantise.straight_through, its weights: w_hat = beta * w, row by row.
// Work O I; 2 O I numbers: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) scale_rows(const REAL* w_OI, const REAL* beta_O, int O, int I,
                                                                 REAL* w_hat_OI) {
  const int o = row_of_thread();
  if (o >= O) return;
  const REAL* w_I = w_OI + (long long)o * I;
  REAL *w_hat_I = w_hat_OI + (long long)o * I, beta = beta_O[o];
  for (int i = threadIdx.x; i < I; i += blockDim.x) w_hat_I[i] = beta * w_I[i];
}

struct alignas(16) Four { REAL at[4]; };

// The byte of x: a NaN's is 0, and the row's scale shows that there was one.
__device__ unsigned byte_of(REAL x, REAL inverse) {
  const REAL q = rint(x * inverse);
  return q == q ? (unsigned)(int)q & 255u : 0u;
}

// quantise_rows for the packed products: int8, padded with zeros to `width` bytes, and each row's sum, by which
// products with unsigned codes are corrected.
// Work 2 N I; reads 4 N I bytes, writes N width: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) quantise_to_bytes(const REAL* x_NI, int N, int I, int width,
                                                                        signed char* q_NI, REAL* scale_N,
                                                                        int* sum_N) {
  __shared__ REAL room[WARP];
  __shared__ int sum_room[WARP];
  const int n = row_of_thread();
  if (n >= N) return;
  const REAL* x_I = x_NI + (long long)n * I;
  unsigned* q_quads = (unsigned*)(q_NI + (long long)n * width);
  const bool aligned = I % 4 == 0 && (unsigned long long)x_NI % sizeof(Four) == 0;
  const REAL gamma = gamma_of_row(x_I, I, room), inverse = (REAL)127 / gamma;
  int sum = 0;
  for (int quad = threadIdx.x; quad < width / 4; quad += blockDim.x) {
    const int i = quad * 4;
    Four x = {};
    if (aligned && i < I) {
      x = *(const Four*)(x_I + i);
    } else {
      #pragma unroll
      for (int k = 0; k < 4; ++k) x.at[k] = i + k < I ? x_I[i + k] : (REAL)0;
    }
    unsigned bytes = 0;
    #pragma unroll
    for (int k = 0; k < 4; ++k) bytes |= byte_of(x.at[k], inverse) << 8 * k;
    sum = __dp4a((int)bytes, 0x01010101, sum);
    q_quads[quad] = bytes;
  }
  sum = sum_of_row(sum, sum_room);
  if (threadIdx.x == 0) scale_N[n] = gamma / (REAL)127, sum_N[n] = sum;
}
