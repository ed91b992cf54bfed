// The negative log-likelihood of the targets, given the logits.

constexpr int MOST_THREADS = 256;

// The largest over a block, NaN if any is; every thread has it.
__device__ REAL largest_of_block(REAL x, REAL* room) {
  const int warps = blockDim.x / WARP;
  x = largest_of_lanes(x);
  if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
  __syncthreads();
  for (int warp = 0; warp < warps; ++warp) x = larger(x, room[warp]);
  __syncthreads();
  return x;
}

// numpy_ref.loss: nll = log sum exp(l - top) - (l[target] - top), 0 where target < 0; a block has one row of logits.
// With `gradient` the row becomes its own gradient: nll = logsumexp(l) - l[target], hence
//   dl = dnll (softmax(l) - onehot(target)),
// times 0 where uncounted: which no NaN survives as a number.
// Work 2 N V exponentials (1 without gradient); the row is read three times (once from memory, then from cache) and
// written once: N V (+ N V) numbers, 8 bytes of float32 for some 40 instructions: bound by memory.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 4)
nll(REAL* logits_NV, const long long* target_N, int V, REAL dnll, bool gradient, REAL* nll_N) {
  __shared__ REAL room[MOST_THREADS / WARP];
  REAL* l_V = logits_NV + (long long)blockIdx.x * V;
  const bool counted = target_N[blockIdx.x] >= 0;
  const int target = counted ? (int)target_N[blockIdx.x] : 0, threads = blockDim.x;
  const REAL at_target = l_V[target];  // before the row is overwritten

  REAL top = l_V[0];
  for (int v = threadIdx.x; v < V; v += threads) top = larger(top, l_V[v]);
  top = largest_of_block(top, room);
  REAL sum = 0;
  for (int v = threadIdx.x; v < V; v += threads) sum += exp(l_V[v] - top);
  const REAL log_sum = log(sum_of_block(sum, room));

  if (threadIdx.x == 0) nll_N[blockIdx.x] = counted ? -((at_target - top) - log_sum) : 0;
  if (!gradient) return;
  const REAL scale = counted ? dnll : 0;
  for (int v = threadIdx.x; v < V; v += threads) {
    const REAL p = exp((l_V[v] - top) - log_sum);
    l_V[v] = (v == target ? p - 1 : p) * scale;
  }
}
