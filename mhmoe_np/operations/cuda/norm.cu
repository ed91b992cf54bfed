// RMSNorm, of x or of a sum of two.

constexpr int MOST_THREADS = 256;

// y = x rstd w and rstd = 1 / sqrt(mean(x^2) + eps) of one row, given each thread's share of the sum of squares.
__device__ void norm_of_row(const REAL* x_D, const REAL* w_D, int D, REAL eps, REAL squares, REAL* y_D, REAL* rstd_1) {
  __shared__ REAL room[MOST_THREADS / WARP];
  const REAL rstd = 1 / sqrt(sum_of_block(squares, room) / D + eps);
  if (threadIdx.x == 0) *rstd_1 = rstd;
  for (int d = threadIdx.x; d < D; d += blockDim.x) y_D[d] = x_D[d] * rstd * w_D[d];
}

// numpy_ref.norm.rms_norm; a block has one row, which it reads again from its cache.
// Work 4 N D operations; 2 N D + D numbers (8 bytes of float32 for 4 operations): bound by memory.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
rms_norm(const REAL* x_ND, const REAL* w_D, int D, REAL eps, REAL* y_ND, REAL* rstd_N) {
  const long long row = (long long)blockIdx.x * D;
  REAL squares = 0;
  for (int d = threadIdx.x; d < D; d += blockDim.x) squares += x_ND[row + d] * x_ND[row + d];
  norm_of_row(x_ND + row, w_D, D, eps, squares, y_ND + row, rstd_N + blockIdx.x);
}

// numpy_ref.norm.add_in_place_and_norm: branch += x, then the norm of that with the same bits as alone. Every thread
// reads again only what it wrote itself.
// Work 5 N D operations; 4 N D + D numbers (16 bytes of float32 for 5 operations): bound by memory.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
add_in_place_and_norm(const REAL* x_ND, REAL* branch_ND, const REAL* w_D, int D, REAL eps, REAL* y_ND, REAL* rstd_N) {
  const long long row = (long long)blockIdx.x * D;
  REAL squares = 0;
  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    const REAL sum = branch_ND[row + d] + x_ND[row + d];
    branch_ND[row + d] = sum;
    squares += sum * sum;
  }
  norm_of_row(branch_ND + row, w_D, D, eps, squares, y_ND + row, rstd_N + blockIdx.x);
}

constexpr int THREADS = 256, ROWS = 16;  // rows of a block

// numpy_ref.norm.rms_norm_backward: with n = x r and y = n w, dn = dy w, and
//   dx = r (dn - n mean(dn n)), added to what is there where `add`;  dw = sum over rows of dy n,
// of which block b gives the sum over its rows, dw_BD[b]; `column_sums` adds these up.
// First each warp takes the mean of two rows, then each thread a column of all of them, which are in the cache by now.
// Work 12 N D operations; 3 N D (4 where `add`) + N D / 16 numbers, 12 bytes of float32 for 12 operations: bound by
// memory.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
rms_norm_backward(const REAL* __restrict__ dy_ND, const REAL* __restrict__ x_ND, const REAL* __restrict__ w_D,
                  const REAL* __restrict__ rstd_N, int N, int D, bool add, REAL* dx_ND, REAL* dw_BD) {
  __shared__ REAL r_ROWS[ROWS], mean_ROWS[ROWS];
  const int first = blockIdx.x * ROWS, rows = min(ROWS, N - first), lane = threadIdx.x % WARP;
  const long long start = (long long)first * D;
  for (int row = threadIdx.x / WARP; row < rows; row += THREADS / WARP) {
    const REAL r = rstd_N[first + row];
    REAL sum = 0;
    for (int d = lane; d < D; d += WARP) {
      const long long i = start + (long long)row * D + d;
      sum += dy_ND[i] * w_D[d] * (x_ND[i] * r);
    }
    sum = sum_of_lanes(sum);
    if (lane == 0) r_ROWS[row] = r, mean_ROWS[row] = sum / D;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += THREADS) {
    const REAL w = w_D[d];
    REAL dw = 0;
    #pragma unroll 4
    for (int row = 0; row < rows; ++row) {
      const long long i = start + (long long)row * D + d;
      const REAL dy = dy_ND[i], r = r_ROWS[row], n = x_ND[i] * r;
      const REAL dx = r * (dy * w - n * mean_ROWS[row]);
      dx_ND[i] = add ? dx_ND[i] + dx : dx;
      dw += dy * n;
    }
    dw_BD[(long long)blockIdx.x * D + d] = dw;
  }
}
