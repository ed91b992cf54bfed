// Linear maps: what goes before cuBLAS's products and after them.

constexpr int COLUMNS = 32, ROWS = 8;  // of a block: a warp has 32 neighbours of one row

// Of numpy_ref.linear.linear: y + b, row by row. Grid: (blocks of rows, of columns).
// Work N O additions; 2 N O + O numbers (8 bytes of float32 for each addition): bound by memory.
extern "C" __global__ void __launch_bounds__(COLUMNS * ROWS)
add_to_rows(const REAL* b_O, int N, int O, REAL* y_NO) {
  const int n = blockIdx.x * ROWS + threadIdx.y, o = blockIdx.y * COLUMNS + threadIdx.x;
  if (n < N && o < O) y_NO[(long long)n * O + o] += b_O[o];
}

// The nearest number with tf32's 10 bits of mantissa, halves away from zero; NaN and infinity stay.
__device__ float tf32_of(float x) {
  return isfinite(x) ? __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xFFFFE000u) : x;
}

// x = high + low, nearly: both are numbers of tf32, and what is lost is below 2^-23 of x. So
//   a b = low_a high_b + high_a low_b + high_a high_b + low_a low_b,
// whose last summand is below 2^-22 of the whole and left out: three products of tf32 are about as good as one of
// float32, whose own rounding is 2^-24 for each of I summands. The low part of what is not finite is NaN.
// Work 4 P operations; 3 P numbers (12 bytes): bound by memory; the products that follow have I FLOP and more a number.
extern "C" __global__ void __launch_bounds__(256) split(const float* x_P, long long P, float* high_P, float* low_P) {
  const long long p = (long long)blockIdx.x * 256 + threadIdx.x;
  if (p >= P) return;
  const float x = x_P[p], high = tf32_of(x);
  high_P[p] = high;
  low_P[p] = tf32_of(x - high);
}
