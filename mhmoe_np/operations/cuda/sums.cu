// Sums: of two arrays, and of an array's numbers.

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
