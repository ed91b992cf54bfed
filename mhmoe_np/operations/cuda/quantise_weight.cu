// BitNet's weights: integers and a scale for each of many joined matrices, in five launches whatever their number.
//
// The sum behind a mean is the exact one, rounded once [D8]. A superaccumulator holds it: an integer of LIMBS digits to
// base 2^32, the lowest bit worth the smallest float there is. Each digit is a signed 64-bit integer, so that 2^31
// numbers may be added before carries are settled, and in any order they give the same integer: atomics may do it.
//
// Each block takes one chunk of one matrix: (matrix, first, last), numbered along the flat w_OI.
// float32's subnormal numbers are read as integers, which nothing flushes to zero.

constexpr int THREADS = 256;
constexpr int EACH = 16;  // numbers that a thread holds at once

#if REAL_IS_DOUBLE
typedef unsigned long long Bits;
constexpr int MANTISSA = 52, LIMBS = 68, LOWEST = -1074;  // 2098 bits and 31 for sums
__device__ Bits bits_of(REAL x) { return (Bits)__double_as_longlong(x); }
#else
typedef unsigned Bits;
constexpr int MANTISSA = 23, LIMBS = 10, LOWEST = -149;  // 277 bits and 31 for sums
__device__ Bits bits_of(REAL x) { return __float_as_uint(x); }
#endif
constexpr int WIDTH = 8 * sizeof(REAL);
constexpr int INFINITE = (1 << (WIDTH - 1 - MANTISSA)) - 1;  // the exponent of what is not finite
constexpr int PLACES = 2 * LIMBS + 1;  // sum |w|, sum w, and how many numbers are not finite

// |x| = mantissa * 2^(position + LOWEST).
struct Parts { unsigned long long mantissa; int position; bool negative, finite; };

__device__ Parts parts_of(Bits bits) {
  const int exponent = (int)(bits >> MANTISSA) & INFINITE;
  const unsigned long long fraction = bits & (((Bits)1 << MANTISSA) - 1);
  return {exponent ? fraction | 1ull << MANTISSA : fraction, exponent ? exponent - 1 : 0, (bits >> (WIDTH - 1)) != 0,
          exponent != INFINITE};
}

// sum += +-magnitude * 2^position, in three digits at most.
__device__ void add_to_limbs(unsigned long long* limbs, unsigned long long magnitude, bool negative, int position) {
  const int shift = position % 32;
  unsigned long long* at = limbs + position / 32;
  const unsigned long long digits[3] = {magnitude << shift & 0xffffffffull, magnitude >> (32 - shift) & 0xffffffffull,
                                        shift ? magnitude >> (64 - shift) : 0};
  #pragma unroll
  for (int k = 0; k < 3; ++k)
    if (digits[k]) atomicAdd(at + k, negative ? 0ull - digits[k] : digits[k]);
}

#if !REAL_IS_DOUBLE
constexpr int WINDOW = 34;  // binades: 24 bits shifted so far, 16 of them, stay below 2^62

// The same for a warp's sum of 64-bit integers, which may itself exceed 64 bits.
__device__ void add_warp_sum(unsigned long long* limbs, long long sum, int position) {
  const long long low = sum_of_lanes(sum & 0xffffffffll), high = sum_of_lanes(sum >> 32);
  if (threadIdx.x % WARP) return;
  if (low) add_to_limbs(limbs, (unsigned long long)low, false, position);
  if (high) add_to_limbs(limbs, (unsigned long long)(high < 0 ? -high : high), high < 0, position + 32);
}
#endif

// numpy_ref.quantise._mean, its sums: sum |w| and, where `centred`, sum w of each matrix, exact.
// Of float32 a warp takes 512 numbers at a time: those within 34 binades of the largest become 64-bit integers that are
// added in registers; the few that are smaller go to the digits in shared memory, as float64's all do.
// Work about 20 integer operations a number; O I numbers: bound by memory (float64: by shared atomics).
extern "C" __global__ void __launch_bounds__(THREADS) sum_exactly(const REAL* w_OI, const long long* chunk_C3,
                                                                  int centred, unsigned long long* limbs_XJ) {
  __shared__ unsigned long long places[PLACES];
  const long long *chunk = chunk_C3 + 3ll * blockIdx.x, last = chunk[2];
  for (int k = threadIdx.x; k < PLACES; k += THREADS) places[k] = 0;
  __syncthreads();
#if REAL_IS_DOUBLE
  for (long long i = chunk[1] + threadIdx.x; i < last; i += THREADS) {
    const Parts x = parts_of(bits_of(w_OI[i]));
    if (!x.finite) {
      atomicAdd(places + 2 * LIMBS, 1ull);
      continue;
    }
    add_to_limbs(places, x.mantissa, false, x.position);
    if (centred) add_to_limbs(places + LIMBS, x.mantissa, x.negative, x.position);
  }
#else
  for (long long start = chunk[1]; start < last; start += EACH * THREADS) {
    Bits bits[EACH];
    int top = 0;
    #pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const long long i = start + k * THREADS + threadIdx.x;
      bits[k] = i < last ? bits_of(w_OI[i]) : 0;
      top = max(top, parts_of(bits[k]).position);
    }
    for (int lanes = WARP / 2; lanes; lanes >>= 1) top = max(top, __shfl_xor_sync(ALL_LANES, top, lanes));
    const int base = max(top - WINDOW, 0);
    long long magnitudes = 0, sum = 0;
    #pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const Parts x = parts_of(bits[k]);
      if (!x.finite) {
        atomicAdd(places + 2 * LIMBS, 1ull);
      } else if (x.position >= base) {
        const long long magnitude = (long long)(x.mantissa << (x.position - base));
        magnitudes += magnitude;
        sum += x.negative ? -magnitude : magnitude;
      } else if (x.mantissa) {
        add_to_limbs(places, x.mantissa, false, x.position);
        if (centred) add_to_limbs(places + LIMBS, x.mantissa, x.negative, x.position);
      }
    }
    add_warp_sum(places, magnitudes, base);
    if (centred) add_warp_sum(places + LIMBS, sum, base);
  }
#endif
  __syncthreads();
  for (int k = threadIdx.x; k < PLACES; k += THREADS)
    if (places[k]) atomicAdd(limbs_XJ + chunk[0] * PLACES + k, places[k]);
}

// The exact sum as the nearest float64, halves to even. Settles the digits in place.
__device__ double rounded(unsigned long long* limbs) {
  long long carry = 0;
  for (int k = 0; k < LIMBS; ++k) {
    const long long digit = (long long)limbs[k] + carry;
    limbs[k] = (unsigned long long)digit & 0xffffffffull;
    carry = digit >> 32;
  }
  const bool negative = carry < 0;
  int top = -1;
  unsigned long long borrow = 1;  // -x = ~x + 1
  for (int k = 0; k < LIMBS; ++k) {
    if (negative) {
      const unsigned long long digit = (~limbs[k] & 0xffffffffull) + borrow;
      limbs[k] = digit & 0xffffffffull, borrow = digit >> 32;
    }
    if (limbs[k]) top = k;
  }
  if (top < 0) return 0;
  const int shift = __clz((int)limbs[top]);
  const unsigned long long below = top > 0 ? limbs[top - 1] : 0, rest = top > 1 ? limbs[top - 2] << shift : 0;
  const unsigned long long leading = (limbs[top] << 32 | below) << shift | rest >> 32;  // its highest bit is 1
  bool more = (rest & 0xffffffffull) != 0;
  for (int k = 0; k < top - 2; ++k) more = more || limbs[k];
  const int highest = top * 32 + 31 - shift;  // the place of that bit
  const int exponent = highest + LOWEST + 1023;
  unsigned long long bits;
  if (exponent <= 0) {  // subnormal: all its bits fit; the last of them is worth 2^-1074
    bits = leading >> (63 - highest);
  } else {
    const unsigned long long dropped = leading & 0x7ff;
    bits = (unsigned long long)exponent << 52 | (leading >> 11 & ((1ull << 52) - 1));
    bits += dropped > 0x400 || (dropped == 0x400 && (more || bits & 1));
  }
  return __longlong_as_double((long long)(bits | (unsigned long long)negative << 63));
}

// The nearest REAL. A conversion may flush to zero what is subnormal in float32, so that is built from its bits.
__device__ REAL real_of(double x) {
#if !REAL_IS_DOUBLE
  if (fabs(x) < 0x1p-126) {
    const unsigned places = (unsigned)rint(fabs(x) * 0x1p149);  // exact, then halves to even
    return __uint_as_float(places | (x < 0 ? 0x80000000u : 0u));
  }
#endif
  return (REAL)x;
}

// numpy_ref.quantise._mean of every matrix: beta = max(mean |w|, 1e-5) and alpha = mean w, NaN where a number is not
// finite; a thread for each. Work 3 LIMBS; 8 LIMBS bytes twice: bound by latency.
extern "C" __global__ void __launch_bounds__(THREADS) means_of_sums(unsigned long long* limbs_XJ,
                                                                    const long long* start_X, int X, int I, int centred,
                                                                    REAL* mean_X2) {
  const int t = blockIdx.x * THREADS + threadIdx.x, x = t / 2, which = t % 2;
  if (x >= X) return;
  unsigned long long* limbs = limbs_XJ + (long long)x * PLACES;
  const double size = (double)((start_X[x + 1] - start_X[x]) * I);
  REAL mean = 0;
  if (limbs[2 * LIMBS]) mean = real_of(__longlong_as_double(0x7ff8000000000000ll));
  else if (which == 0 || centred) mean = real_of(rounded(limbs + which * LIMBS) / size);
  mean_X2[t] = which == 0 ? larger(mean, (REAL)1e-5) : mean;
}

// Whether x - middle > 0 for finite numbers, subnormal ones too: compared as integers, in the floats' order.
__device__ bool exceeds(REAL x, REAL middle) {
#if REAL_IS_DOUBLE
  return x > middle;
#else
  const int a = (int)bits_of(x), b = (int)bits_of(middle);
  return (a < 0 ? (int)(0x80000000u - (unsigned)a) : a) > (b < 0 ? (int)(0x80000000u - (unsigned)b) : b);
#endif
}

// numpy_ref.quantise.quantise_weight: b158's q = clip(round(w * (1/beta)), -1, 1), or, `centred`, bitnet's
// q = +1 where w - alpha > 0, else -1; and beta of every row. Counted: how many are -1, 0 and +1, how many changed.
// (Equal bits for beta up to 8.5e37, beyond which float32's 1/beta is subnormal.)
// Work 2 O I; reads w and q, writes q, 12 O I bytes: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) quantise_chunks(const REAL* w_OI, const long long* chunk_C3,
                                                                      int I, int centred, const REAL* mean_X2,
                                                                      REAL* q_OI, REAL* beta_O,
                                                                      unsigned long long* count_X4) {
  __shared__ int room[THREADS / WARP];
  const long long *chunk = chunk_C3 + 3ll * blockIdx.x, matrix = chunk[0], first = chunk[1], last = chunk[2];
  const REAL beta = mean_X2[2 * matrix], alpha = mean_X2[2 * matrix + 1], inverse = (REAL)1 / beta;
  const bool finite = beta == beta;
  int counts[4] = {};
  for (long long i = first + threadIdx.x; i < last; i += THREADS) {
    REAL q;
    if (centred) {
      q = finite && exceeds(w_OI[i], alpha) ? 1 : -1;
    } else {
      q = rint(w_OI[i] * inverse);  // NaN stays, and -0
      q = q > 1 ? (REAL)1 : q < -1 ? (REAL)-1 : q;
    }
    counts[0] += q == -1, counts[1] += q == 0, counts[2] += q == 1, counts[3] += q != q_OI[i];
    q_OI[i] = q;
  }
  for (long long o = (first + I - 1) / I + threadIdx.x; o * I < last; o += THREADS) beta_O[o] = beta;
  #pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int count = sum_of_block(counts[k], room);
    if (threadIdx.x == 0 && count) atomicAdd(count_X4 + 4 * matrix + k, (unsigned long long)count);
  }
}

// The report on every matrix: beta, how many of its integers are -1, 0 and +1, how many changed.
// Work X; 80 X bytes: bound by a launch.
extern "C" __global__ void __launch_bounds__(THREADS) report_matrices(const REAL* mean_X2,
                                                                      const unsigned long long* count_X4, int X,
                                                                      double* report_X5) {
  const int x = blockIdx.x * THREADS + threadIdx.x;
  if (x >= X) return;
  report_X5[5ll * x] = mean_X2[2 * x];
  #pragma unroll
  for (int k = 0; k < 4; ++k) report_X5[5ll * x + 1 + k] = (double)count_X4[4ll * x + k];
}
