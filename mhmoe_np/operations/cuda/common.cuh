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

// The activations of numpy_ref.feed_forward, and their slopes.
struct Activated { REAL value, slope; };

// silu(g) = g s with s = sigmoid(g);  silu'(g) = s + g s (1 - s).
struct Silu {};
__device__ Activated activated(Silu, REAL g) {
  const REAL s = 1 / (1 + exp(-g)), value = g * s;
  return {value, s + value * (1 - s)};
}

// relu2(g) = max(g, 0)^2;  relu2'(g) = 2 max(g, 0).
struct Relu2 {};
__device__ Activated activated(Relu2, REAL g) {
  const REAL positive = larger(g, REAL(0));
  return {positive * positive, 2 * positive};
}

// Where a kernel is told which of the two it is; and numpy_ref.feed_forward.gated_activation of one number.
__device__ Activated activated(bool silu, REAL g) { return silu ? activated(Silu(), g) : activated(Relu2(), g); }
__device__ REAL gated(REAL gate, REAL up, bool silu) { return activated(silu, gate).value * up; }
