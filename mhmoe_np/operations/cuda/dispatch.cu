// Sorting by a small integer: the router's choices by expert, and tokens by id. A stable counting sort in three kernels,
// for any number of experts.
//
// Choices are numbered in filling order: q = j M + s is the j-th choice of sub-token s. They are cut into segments of
// consecutive ones, for each of which there is a count of every expert.

constexpr int THREADS = 256, PLACES = 32;  // PLACES * WARP threads scan the counts

// The expert of a choice in filling order; -1 beyond the last.
__device__ int expert_of(const long long* expert_MK, long long q, int M, int K) {
  return q < (long long)M * K ? (int)expert_MK[q % M * K + q / M] : -1;
}

// The first of three parts of numpy_ref.dispatch.dispatch: how many choices of each segment are for each expert. A block
// has a segment. Integers are added atomically: their sums have no order.
// Work M K additions; moves 8 M K + 8 segments E bytes: bound by latency.
extern "C" __global__ void __launch_bounds__(THREADS)
    count_choices(const long long* expert_MK, int M, int K, int E, int segment, int* counts, unsigned* blocks_done_1) {
  int* count_E = counts + (long long)blockIdx.x * E;
  for (int e = threadIdx.x; e < E; e += THREADS) count_E[e] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) blocks_done_1[0] = 0;  // for the next kernel
  __syncthreads();
  for (int i = threadIdx.x; i < segment; i += THREADS) {
    const int e = expert_of(expert_MK, (long long)blockIdx.x * segment + i, M, K);
    if (e >= 0) atomicAdd(count_E + e, 1);
  }
}

// The sum over a warp's lanes up to this one.
__device__ int sum_up_to_lane(int x) {
  for (int by = 1; by < WARP; by <<= 1) {
    const int other = __shfl_up_sync(ALL_LANES, x, by);
    if ((int)threadIdx.x >= by) x += other;
  }
  return x;
}

// The second part: each count becomes that of the segments before, and start_Z the sum of what the experts before keep.
// A block has WARP experts, its PLACES warps a share of the segments each. The block that ends last adds up the experts.
// Work 2 segments E + E additions; moves 12 segments E bytes: bound by latency.
extern "C" __global__ void __launch_bounds__(PLACES * WARP)
    place_segments(int* counts, int segments, int E, int capacity, unsigned* blocks_done_1, long long* start_Z) {
  __shared__ int part[PLACES][WARP];
  __shared__ int kept_of_warp[PLACES];
  __shared__ bool is_last;
  const int lane = threadIdx.x, y = threadIdx.y, e = blockIdx.x * WARP + lane;
  const int share = (segments + PLACES - 1) / PLACES, first = min(y * share, segments), last = min(first + share, segments);
  int sum = 0;
  if (e < E)
    for (int s = first; s < last; ++s) sum += counts[(long long)s * E + e];
  part[y][lane] = sum;
  __syncthreads();
  sum = 0;
  for (int before = 0; before < y; ++before) sum += part[before][lane];
  if (e < E) {
    for (int s = first; s < last; ++s) {
      const int count = counts[(long long)s * E + e];
      counts[(long long)s * E + e] = sum;
      sum += count;
    }
    if (y == PLACES - 1) start_Z[e + 1] = min(sum, capacity);  // what it keeps, until the last block
  }

  __threadfence();
  __syncthreads();
  if (lane == 0 && y == 0) is_last = atomicAdd(blocks_done_1, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  volatile long long* kept_Z = start_Z;  // other blocks wrote it: not from this one's cache
  const int experts = (E + PLACES - 1) / PLACES, begin = min(y * experts, E), end = min(begin + experts, E);  // of a warp
  int kept = 0;
  for (int i = begin + lane; i < end; i += WARP) kept += (int)kept_Z[i + 1];
  kept = sum_of_lanes(kept);
  if (lane == 0) kept_of_warp[y] = kept;
  __syncthreads();
  int start = 0;
  for (int before = 0; before < y; ++before) start += kept_of_warp[before];
  for (int i = begin; i < end; i += WARP) {
    const bool mine = i + lane < end;
    const int up_to = start + sum_up_to_lane(mine ? (int)kept_Z[i + lane + 1] : 0);
    if (mine) kept_Z[i + lane + 1] = up_to;
    start = __shfl_sync(ALL_LANES, up_to, WARP - 1);
  }
  if (lane == 0 && y == 0) kept_Z[0] = 0;
}

// The third part: where each choice goes. A warp has a segment and places 32 choices at a time, counting on: of equal
// ones among the lanes the lower comes first. Rows beyond start_Z[E], which only a capacity leaves, become -1.
// Work: of integers alone; moves 24 M K bytes and as many sectors of counts: bound by latency, some 0.5 us for each 32
// choices of a segment.
extern "C" __global__ void __launch_bounds__(WARP)
    place_choices(const long long* expert_MK, int M, int K, int E, int segment, int* counts, const long long* start_Z,
                  int rows, long long* route_R, long long* slot_MK) {
  int* count_E = counts + (long long)blockIdx.x * E;
  const int lane = threadIdx.x;
  const long long choices = (long long)M * K, first = (long long)blockIdx.x * segment;
  const long long last = min(first + segment, choices), kept = start_Z[E];
  int coming = expert_of(expert_MK, first + lane, M, K);
  for (long long step = first; step < last; step += WARP) {
    const int e = coming;
    const long long q = step + lane;
    coming = step + WARP < last ? expert_of(expert_MK, q + WARP, M, K) : -1;
    const unsigned peers = __match_any_sync(ALL_LANES, e);
    const int ahead = __popc(peers & ((1u << lane) - 1));
    const int place = e >= 0 ? count_E[e] + ahead : 0;
    __syncwarp();
    if (e >= 0 && ahead == 0) count_E[e] = place + __popc(peers);
    __syncwarp();
    if (e < 0) continue;
    const long long row = start_Z[e] + place, choice = q % M * K + q / M;
    const bool fits = row < start_Z[e + 1];
    slot_MK[choice] = fits ? row : -1;
    if (fits) route_R[row] = choice;
    if (q >= kept && q < rows) route_R[q] = -1;
  }
}
