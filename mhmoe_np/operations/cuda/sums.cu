// Sums: of two arrays, of an array's numbers, and of its columns.

constexpr int THREADS = 256;

// numpy_ref.sums.add_in_place: onto += x.
// Work N D additions; 3 N D numbers (12 bytes of float32 for each addition): bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) add_in_place(const REAL* x_P, long long P, REAL* onto_P) {
  const long long p = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (p < P) onto_P[p] += x_P[p];
}

// numpy_ref.sums.add_sum: total += sum x, in float64; one block: N is the number of tokens.
// Work N additions; N numbers: bound by a launch.
extern "C" __global__ void __launch_bounds__(THREADS) add_sum(const REAL* x_N, long long N, double* total_1) {
  __shared__ double room[THREADS / WARP];
  double sum = 0;
  for (long long n = threadIdx.x; n < N; n += THREADS) sum += x_N[n];
  sum = sum_of_block(sum, room);
  if (threadIdx.x == 0) total_1[0] += sum;
}

constexpr int COLUMNS = 32, ROWS = THREADS / COLUMNS;

// Of numpy_ref.linear.linear_backward: db[o] = sum_n dy[n,o], and of whatever else is a sum over rows, in two stages:
// sums[b] = the sum of the b-th `rows` rows, added to what is there where `add`. Grid: (blocks of rows, of columns).
// Work N O additions; N O numbers (4 bytes of float32 for each addition): bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS)
column_sums(const REAL* x_NO, int N, int O, int rows, REAL* sums_BO, bool add) {
  __shared__ REAL room[ROWS][COLUMNS];
  const int o = blockIdx.y * COLUMNS + threadIdx.x;
  const long long first = (long long)blockIdx.x * rows, last = first + rows < N ? first + rows : N;
  REAL sum = 0;
  if (o < O)
    for (long long n = first + threadIdx.y; n < last; n += ROWS) sum += x_NO[n * O + o];
  room[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || o >= O) return;
  for (int row = 1; row < ROWS; ++row) sum += room[row][threadIdx.x];
  REAL& to = sums_BO[(long long)blockIdx.x * O + o];
  to = add ? to + sum : sum;
}
