// Rotary positions.

constexpr int THREADS = 128;

// numpy_ref.attention.rotate_in_place: (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (x[j], x[j + J]).
// A block is one token; its threads take the pairs of all heads. Every product rounds, as in the definition.
// Work 6 B T A J; moves 16 B T A J bytes and the tables (once a token, from the cache): bound by memory.
__device__ void rotate(REAL* x_BTAC, long long x_b, long long x_t, long long x_head, const REAL* cos_YJ,
                       const REAL* sin_YJ, long long first, int T, int A, int J) {
  const int b = blockIdx.x / T, t = blockIdx.x % T;
  REAL* x_AC = x_BTAC + b * x_b + t * x_t;
  const REAL *cos_J = cos_YJ + (first + t) * J, *sin_J = sin_YJ + (first + t) * J;
  for (int pair = threadIdx.x; pair < A * J; pair += THREADS) {
    const int j = pair % J;
    REAL* x_C = x_AC + pair / J * x_head;
    const REAL real = x_C[j], imaginary = x_C[j + J], cosine = cos_J[j], sine = sin_J[j];
    x_C[j] = real * cosine - imaginary * sine;
    x_C[j + J] = imaginary * cosine + real * sine;
  }
}

// By the tables' first rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    rotate_in_place(REAL* x_BTAC, long long x_b, long long x_t, long long x_head, const REAL* cos_YJ,
                    const REAL* sin_YJ, int T, int A, int J) {
  rotate(x_BTAC, x_b, x_t, x_head, cos_YJ, sin_YJ, 0, T, A, J);
}

// By the tables' rows from first_1[0] on.
extern "C" __global__ void __launch_bounds__(THREADS)
    rotate_in_place_from(REAL* x_BTAC, long long x_b, long long x_t, long long x_head, const REAL* cos_YJ,
                         const REAL* sin_YJ, const long long* first_1, int T, int A, int J) {
  rotate(x_BTAC, x_b, x_t, x_head, cos_YJ, sin_YJ, first_1[0], T, A, J);
}
