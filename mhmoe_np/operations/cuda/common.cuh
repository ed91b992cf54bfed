// What all kernels share. REAL is float or double; every kernel exists for both.
//
// Sums have one order, whoever computes them: a result depends on the sizes alone, so the same call gives the same bits.

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

// The sum over a warp's lanes, in a butterfly; every lane has it.
template <class T> __device__ T sum_of_lanes(T x) {
  for (int bits = WARP / 2; bits; bits >>= 1) x += __shfl_xor_sync(ALL_LANES, x, bits);
  return x;
}

// The larger of the two, NaN if either is one: `max` itself passes over NaN.
template <class T> __device__ T larger(T x, T y) { return isnan(x) || x > y ? x : y; }

// The largest of a warp's lanes, NaN if any is.
template <class T> __device__ T largest_of_lanes(T x) {
  for (int bits = WARP / 2; bits; bits >>= 1) x = larger(x, __shfl_xor_sync(ALL_LANES, x, bits));
  return x;
}

// The sum over a block of whole warps (at most 32); every thread has it. `room` has a place for each warp.
template <class T> __device__ T sum_of_block(T x, T* room) {
  const int thread = threadIdx.x + blockDim.x * threadIdx.y, warps = blockDim.x * blockDim.y / WARP;
  x = sum_of_lanes(x);
  if (thread % WARP == 0) room[thread / WARP] = x;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += room[warp];
  __syncthreads();
  return sum;
}

// numpy_ref.feed_forward.gated_activation of one number: act(gate) * up, act being SiLU or squared ReLU.
template <class T> __device__ T sigmoid(T x) { return 1 / (1 + exp(-x)); }
template <class T> __device__ T gated(T gate, T up, bool silu) {
  const T positive = larger(gate, T(0));
  return silu ? gate * sigmoid(gate) * up : positive * positive * up;
}
