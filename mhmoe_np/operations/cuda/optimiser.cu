// AdamW on one flat buffer, and the norm that clipping needs.

constexpr int THREADS = 256, EACH = 4;  // EACH: numbers of a thread in `adamw`
constexpr int CHUNK = 8192;             // numbers of a block in `sum_of_squares`

// The first half of numpy_ref.optimiser.add_sum_of_squares: the sum of x^2 of every chunk, in float64.
// Work P multiply-adds; moves 4 P bytes: 1/2 FLOP/byte, bound by memory, 0.13 ms for 10^8 parameters.
extern "C" __global__ void __launch_bounds__(THREADS) sum_of_squares(const REAL* x_P, long long P, double* chunks) {
  __shared__ double room[THREADS / WARP];
  const long long first = (long long)blockIdx.x * CHUNK;
  double sum = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < CHUNK; i += THREADS) {
    const double x = first + i < P ? x_P[first + i] : REAL(0);
    sum = fma(x, x, sum);
  }
  sum = sum_of_block(sum, room);
  if (threadIdx.x == 0) chunks[blockIdx.x] = sum;
}

// The second half: one block adds up the chunks. Work P / 8192 additions, as many float64 read: bound by a launch.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_sum_of_squares(const double* chunks, int chunk_count, double* total_1) {
  __shared__ double room[THREADS / WARP];
  double sum = 0;
  for (int i = threadIdx.x; i < chunk_count; i += THREADS) sum += chunks[i];
  sum = sum_of_block(sum, room);
  if (threadIdx.x == 0) total_1[0] += sum;
}

// update_8, which a step brings: numbers of float64.
enum { LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY, CLIP_NORM, UNBIAS1, UNBIAS2 };
// What `adamw` reads: those but the clip norm, rounded once, in whose place is the factor that clips; and 1 - beta.
enum { FACTOR = CLIP_NORM, REST1 = UNBIAS2 + 1, REST2, FACTORS };

// The first of three parts of numpy_ref.optimiser.adamw_in_place: whether all of the guard is finite, and what every
// element is multiplied by. factor = min(1, clip_norm / norm), NaN where the norm is. Work and bytes: of the guard alone,
// bound by a launch.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw_begins(const double* squares_1, const double* guard, long long guards, const double* update_8, REAL* factors,
                 bool* goes_on_1, unsigned long long* left_out_1) {
  __shared__ int room[THREADS / WARP];
  int bad = 0;
  for (long long i = threadIdx.x; i < guards; i += THREADS) bad |= !isfinite(guard[i]);
  bad = sum_of_block(bad, room);
  if (threadIdx.x) return;
  goes_on_1[0] = bad == 0;
  left_out_1[0] = 0;
  for (int i = 0; i <= UNBIAS2; ++i) factors[i] = REAL(update_8[i]);
  const double norm = sqrt(squares_1[0]), factor = update_8[CLIP_NORM] / (norm < 1e-30 ? 1e-30 : norm);
  factors[FACTOR] = REAL(factor > 1 ? 1 : factor);
  factors[REST1] = REAL(1 - update_8[BETA1]), factors[REST2] = REAL(1 - update_8[BETA2]);
}

// The second part: g = factor gradient; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
// p = p - lr (decay p + (m / unbias1) / (sqrt(v / unbias2) + epsilon)), gradient = 0; rounded as NumPy rounds.
// Work 12 P multiply-adds, 3 P divisions, P roots; moves 32 P bytes: 1/2 FLOP/byte, bound by memory, 1.1 ms for 10^8
// parameters.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(REAL* parameter_P, REAL* gradient_P, REAL* first_moment_P, REAL* second_moment_P, long long P,
          const REAL* factors, const bool* goes_on_1, unsigned long long* left_out_1) {
  if (!goes_on_1[0]) return;
  const REAL rate = factors[LEARNING_RATE], beta1 = factors[BETA1], beta2 = factors[BETA2], epsilon = factors[EPSILON];
  const REAL decay = factors[WEIGHT_DECAY], factor = factors[FACTOR], unbias1 = factors[UNBIAS1];
  const REAL unbias2 = factors[UNBIAS2], rest1 = factors[REST1], rest2 = factors[REST2];
  const long long start = (long long)blockIdx.x * (THREADS * EACH) + threadIdx.x;
  REAL parameter[EACH], gradient[EACH], first_moment[EACH], second_moment[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const long long p = start + i * THREADS;
    if (p >= P) continue;
    parameter[i] = parameter_P[p], gradient[i] = gradient_P[p];
    first_moment[i] = first_moment_P[p], second_moment[i] = second_moment_P[p];
  }
  int left_out = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const long long p = start + i * THREADS;
    if (p >= P) continue;
    const REAL g = gradient[i] * factor;
    const REAL first = beta1 * first_moment[i] + rest1 * g;
    const REAL second = beta2 * second_moment[i] + rest2 * (g * g);
    const REAL root = sqrt(second / unbias2) + epsilon;
    const REAL updated = parameter[i] - rate * (decay * parameter[i] + first / unbias1 / root);
    if (isfinite(first) && isfinite(second) && isfinite(updated))
      parameter_P[p] = updated, gradient_P[p] = 0, first_moment_P[p] = first, second_moment_P[p] = second;
    else
      ++left_out;
  }
  left_out = sum_of_lanes(left_out);
  if (threadIdx.x % WARP == 0 && left_out) atomicAdd(left_out_1, (unsigned long long)left_out);  // integers: no order
}

// The third part: left_out += how many elements were left out. Bound by a launch.
extern "C" __global__ void __launch_bounds__(WARP) adamw_ends(const unsigned long long* count_1, double* left_out_1) {
  if (threadIdx.x == 0) left_out_1[0] += (double)count_1[0];
}
