// The router: softmax over all experts, the K largest, gates; the way back; and what is counted of them.
//
// A warp has a row: lane l has the experts l, l + 32, l + 64, ... A sum runs over a lane's experts in order, then over
// the lanes in a butterfly.

constexpr int ROWS = 8;  // of a block

// Visit a lane's experts: (e, which of its own). Up to HELD of them, which may then stay in registers; HELD = 0: any
// number, which stay in memory.
template <int HELD, class Visit> __device__ void for_each_expert(int E, Visit visit) {
  if constexpr (HELD > 0) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int e = threadIdx.x + i * WARP;
      if (e < E) visit(e, i);
    }
  } else {
    for (int e = threadIdx.x; e < E; e += WARP) visit(e, 0);
  }
}

// Whether expert e of probability p is chosen before f of q: the larger one, then the lower index; NaN comes last.
__device__ bool precedes(REAL p, int e, REAL q, int f) {
  const REAL rank = p >= 0 ? p : REAL(-1), other = q >= 0 ? q : REAL(-1);
  return rank > other || (rank == other && e < f);
}

template <int HELD>
__device__ void route_row(const REAL* logits_E, int E, int K, bool normalise, REAL* p_E, REAL* log_sum_exp_1,
                          long long* expert_K, REAL* gate_K) {
  const int lane = threadIdx.x;
  REAL held[HELD ? HELD : 1] = {};
  const auto number = [&](int e, int i) -> REAL& {
    if constexpr (HELD > 0) return held[i];
    else return p_E[e];
  };
  REAL highest = logits_E[0], sum = 0;
  for_each_expert<HELD>(E, [&](int e, int i) { highest = larger(highest, number(e, i) = logits_E[e]); });
  highest = largest_of_lanes(highest);
  for_each_expert<HELD>(E, [&](int e, int i) { sum += number(e, i) = exp(number(e, i) - highest); });
  sum = sum_of_lanes(sum);
  for_each_expert<HELD>(E, [&](int e, int i) { p_E[e] = number(e, i) /= sum; });  // P2 eq. 5

  // K times: the first of those that come after the last one chosen. Nothing is marked, and none is chosen twice.
  REAL chosen_p = 0, chosen_sum = 0;
  int chosen = -1;
  for (int k = 0; k < K; ++k) {
    REAL best_p = 0;
    int best = -1;  // none
    for_each_expert<HELD>(E, [&](int e, int i) {
      const REAL p = number(e, i);
      if ((chosen < 0 || precedes(chosen_p, chosen, p, e)) && (best < 0 || precedes(p, e, best_p, best)))
        best_p = p, best = e;
    });
    for (int bits = WARP / 2; bits; bits >>= 1) {
      const REAL other_p = __shfl_xor_sync(ALL_LANES, best_p, bits);
      const int other = __shfl_xor_sync(ALL_LANES, best, bits);
      if (other >= 0 && (best < 0 || precedes(other_p, other, best_p, best))) best_p = other_p, best = other;
    }
    chosen_p = best_p, chosen = best, chosen_sum += best_p;
    if (lane == k % WARP) expert_K[k] = best, gate_K[k] = best_p;
  }
  if (normalise)
    for (int k = lane; k < K; k += WARP) gate_K[k] /= chosen_sum;  // by the lane that wrote it
  if (lane == 0) log_sum_exp_1[0] = highest + log(sum);
}

// numpy_ref.router.route: p = softmax(logits), the K largest with ties to the lower index, gate = p of the chosen,
// divided by their sum where `normalise`.
// Work M E exponentials and M E K comparisons; moves 4 (2 M E + M + M K) + 8 M K bytes: about 1 FLOP/byte, bound by
// memory: 11 us for 65,536 rows of 64 experts. Beyond 256 experts p is read again from the caches, K + 2 times.
extern "C" __global__ void __launch_bounds__(ROWS * WARP, 2)
    route(const REAL* logits_ME, int M, int E, int K, bool normalise, REAL* p_ME, REAL* log_sum_exp_M,
          long long* expert_MK, REAL* gate_MK) {
  const int m = blockIdx.x * ROWS + threadIdx.y;
  if (m >= M) return;
  const long long row = (long long)m * E, choice = (long long)m * K;
  const auto with = [&](auto route_of_size) {
    route_of_size(logits_ME + row, E, K, normalise, p_ME + row, log_sum_exp_M + m, expert_MK + choice, gate_MK + choice);
  };
  if (E <= WARP) with(route_row<1>);
  else if (E <= 2 * WARP) with(route_row<2>);
  else if (E <= 4 * WARP) with(route_row<4>);
  else if (E <= 8 * WARP) with(route_row<8>);
  else with(route_row<0>);
}

template <int HELD>
__device__ void route_row_backward(const REAL* dgate_K, const REAL* p_E, REAL log_sum_exp, const long long* expert_K,
                                   const REAL* gate_K, bool counted, const double* count_E, int E, int K, bool normalise,
                                   double dp_of_count, REAL dlog_sum_exp_of_itself, REAL* dlogits_E) {
  REAL held[HELD ? HELD : 1] = {};
  const auto dp = [&](int e, int i) -> REAL& {
    if constexpr (HELD > 0) return held[i];
    else return dlogits_E[e];
  };
  REAL pull = 0, chosen_sum = 1;
  if (normalise) {
    chosen_sum = 0;
    for (int k = 0; k < K; ++k) pull += dgate_K[k] * gate_K[k], chosen_sum += p_E[expert_K[k]];
  }
  for_each_expert<HELD>(E, [&](int e, int i) { dp(e, i) = counted ? REAL(dp_of_count * count_E[e]) : REAL(0); });
  for (int k = 0; k < K; ++k) {
    const int chosen = expert_K[k];
    const REAL dchosen = (dgate_K[k] - pull) / chosen_sum;
    for_each_expert<HELD>(E, [&](int e, int i) {
      if (e == chosen) dp(e, i) += dchosen;
    });
  }
  REAL mean = 0;
  for_each_expert<HELD>(E, [&](int e, int i) { mean += dp(e, i) * p_E[e]; });
  mean = sum_of_lanes(mean);
  const REAL dlog_sum_exp = counted ? log_sum_exp * dlog_sum_exp_of_itself : REAL(0);
  for_each_expert<HELD>(E, [&](int e, int i) { dlogits_E[e] = p_E[e] * (dp(e, i) - mean) + dlog_sum_exp * p_E[e]; });
}

// numpy_ref.router.route_backward. Of gate = c / S with S = sum(c), c = p of the chosen: dc = (dgate - sum(dgate gate)) / S.
// Of the balance loss E sum_e f_e mean_s p[s, e] each counted row's dp = dp_of_count count_e; of the z-loss its
// log-sum-exp receives itself times a factor, whose derivative is p. Of the softmax dlogits = p (dp - sum(dp p)).
// Work 4 M E + 6 M K multiply-adds and M E K comparisons; moves 4 (2 M E + 2 M K + M) + 8 M K bytes: about 1 FLOP/byte,
// bound by memory: 12 us for 65,536 rows of 64 experts.
extern "C" __global__ void __launch_bounds__(ROWS * WARP, 2)
    route_backward(const REAL* dgate_MK, const REAL* p_ME, const REAL* log_sum_exp_M, const long long* expert_MK,
                   const REAL* gate_MK, const bool* counted_M, const double* count_E, int M, int E, int K, bool normalise,
                   double dp_of_count, REAL dlog_sum_exp_of_itself, REAL* dlogits_ME) {
  const int m = blockIdx.x * ROWS + threadIdx.y;
  if (m >= M) return;
  const long long row = (long long)m * E, choice = (long long)m * K;
  const auto with = [&](auto backward_of_size) {
    backward_of_size(dgate_MK + choice, p_ME + row, log_sum_exp_M[m], expert_MK + choice, gate_MK + choice, counted_M[m],
                     count_E, E, K, normalise, dp_of_count, dlog_sum_exp_of_itself, dlogits_ME + row);
  };
  if (E <= WARP) with(route_row_backward<1>);
  else if (E <= 2 * WARP) with(route_row_backward<2>);
  else if (E <= 4 * WARP) with(route_row_backward<4>);
  else if (E <= 8 * WARP) with(route_row_backward<8>);
  else with(route_row_backward<0>);
}

constexpr int SUMS = 4;  // of each expert: first choices, choices, p, dropped

// The first half of numpy_ref.router.add_router_statistics: the sums of every strip of rows, in float64, as [4 E + 1,
// strips]; the last one is of squared log-sum-exps. A thread has an expert and every ROWS-th row of the strip; the block
// adds up its ROWS sums in order.
// Work M E additions and M E K comparisons; moves 4 M E + 16 M K + 5 M bytes: about 1/2 FLOP/byte, bound by memory.
extern "C" __global__ void __launch_bounds__(ROWS * WARP)
    router_statistics(const REAL* p_ME, const REAL* log_sum_exp_M, const long long* expert_MK, const long long* slot_MK,
                      const bool* counted_M, int M, int E, int K, int strip, double* strips) {
  __shared__ double part[SUMS][ROWS][WARP];
  __shared__ double part_of_squares[ROWS];
  const int e = blockIdx.y * WARP + threadIdx.x, y = threadIdx.y;
  const int first = blockIdx.x * strip, last = min(M - first, strip) + first;
  double first_choices = 0, choices = 0, p_sum = 0, dropped = 0, squares = 0;
  for (int m = first + y; m < last; m += ROWS) {
    if (!counted_M[m]) continue;
    if (e == 0) squares += (double)log_sum_exp_M[m] * log_sum_exp_M[m];
    if (e >= E) continue;
    p_sum += p_ME[(long long)m * E + e];
    for (int k = 0; k < K; ++k) {
      if (expert_MK[(long long)m * K + k] != e) continue;
      choices += 1;
      first_choices += k == 0;
      dropped += slot_MK[(long long)m * K + k] < 0;
    }
  }
  part[0][y][threadIdx.x] = first_choices, part[1][y][threadIdx.x] = choices;
  part[2][y][threadIdx.x] = p_sum, part[3][y][threadIdx.x] = dropped;
  if (threadIdx.x == 0) part_of_squares[y] = squares;
  __syncthreads();
  if (y < SUMS && e < E) {
    double sum = 0;
    for (int row = 0; row < ROWS; ++row) sum += part[y][row][threadIdx.x];
    strips[((long long)y * E + e) * gridDim.x + blockIdx.x] = sum;
  }
  if (y == SUMS && e == 0) {
    double sum = 0;
    for (int row = 0; row < ROWS; ++row) sum += part_of_squares[row];
    strips[(long long)SUMS * E * gridDim.x + blockIdx.x] = sum;
  }
}

// The second half: a warp adds up the strips of one sum. p goes on in its own type.
// Work (4 E + 1) strips additions, as many float64 read: bound by a launch.
extern "C" __global__ void __launch_bounds__(ROWS * WARP)
    add_router_statistics(const double* strips, int strip_count, int E, double* first_choice_E, double* choice_E,
                          double* p_E, double* dropped_E, double* squared_log_sum_exp_1) {
  const int i = blockIdx.x * ROWS + threadIdx.y;
  if (i > SUMS * E) return;
  double sum = 0;
  for (int s = threadIdx.x; s < strip_count; s += WARP) sum += strips[(long long)i * strip_count + s];
  sum = sum_of_lanes(sum);
  if (threadIdx.x) return;
  const int e = i % E;
  if (i == SUMS * E) squared_log_sum_exp_1[0] += sum;
  else if (i < E) first_choice_E[e] += sum;
  else if (i < 2 * E) choice_E[e] += sum;
  else if (i < 3 * E) p_E[e] = REAL(p_E[e]) + REAL(sum);
  else dropped_E[e] += sum;
}
