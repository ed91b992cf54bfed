// The experts but for their products of matrices: activation, sub-norm, the gated sum, and their gradients.
//
// Rows are sorted by expert; those from start_Z[E] on, up to the bound that the host knows, are nobody's. Where a kernel
// goes by rows, a warp has one.

constexpr int THREADS = 256, ROWS = THREADS / WARP;  // rows of a block
constexpr int COLUMNS = 32, LINES = 16;              // of a block that sums columns

// The expert of row r < start_Z[E]: the first whose rows end beyond it.
__device__ int expert_of(int r, const long long* start_Z, int E) {
  int low = 0, high = E - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (start_Z[middle + 1] > r) high = middle;
    else low = middle + 1;
  }
  return low;
}

__device__ int row_of_warp() { return blockIdx.x * ROWS + threadIdx.x / WARP; }

// ---- numpy_ref.experts.expert_ffn ---------------------------------------------------------------------------------

// s[r], the sub-token of row r; 0 for nobody's rows.
// No arithmetic; moves 16 R bytes: bound by a launch.
extern "C" __global__ void __launch_bounds__(THREADS) sub_tokens_of_rows(
    const long long* route_R, int choices, int bound, long long* sub_token_R) {
  const int r = blockIdx.x * THREADS + threadIdx.x;
  if (r < bound) sub_token_R[r] = route_R[r] < 0 ? 0 : (int)route_R[r] / choices;
}

// h = act(gate) * up; nobody's rows become 0, in gate_up too.
// normed: n = h rstd w instead, as in the forward, which kept rstd alone (numpy_ref.experts._one_expert_backward).
// Work R F activations; moves 12 R F bytes: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) activate_rows(
    const long long* start_Z, int E, int bound, int F, bool silu, bool normed, const REAL* sub_norm_EF, const REAL* rstd_R,
    REAL* gate_up_R2F, REAL* n_RF) {
  const int r = row_of_warp();
  if (r >= bound) return;
  const bool used = r < start_Z[E];
  REAL *gate_F = gate_up_R2F + 2LL * r * F, *up_F = gate_F + F, *n_F = n_RF + (long long)r * F;
  const REAL* w_F = sub_norm_EF + (normed && used ? (long long)expert_of(r, start_Z, E) * F : 0);
  for (int f = threadIdx.x % WARP; f < F; f += WARP)
    if (used) {
      const REAL h = gated(gate_F[f], up_F[f], silu);
      n_F[f] = normed ? h * rstd_R[r] * w_F[f] : h;
    } else {
      gate_F[f] = up_F[f] = n_F[f] = 0;
    }
}

// numpy_ref.norm.rms_norm of every row with its expert's weights, in place: n = h rstd w, rstd = 1 / sqrt(mean h^2 + eps);
// rstd of nobody's rows becomes 0.
// Work 4 R F FLOP; moves 8 R F bytes: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(
    const long long* start_Z, int E, int bound, int F, const REAL* sub_norm_EF, REAL eps, REAL* h_RF, REAL* rstd_R) {
  const int r = row_of_warp(), lane = threadIdx.x % WARP;
  if (r >= bound) return;
  if (r >= start_Z[E]) {
    if (lane == 0) rstd_R[r] = 0;
    return;
  }
  REAL* h_F = h_RF + (long long)r * F;
  const REAL* w_F = sub_norm_EF + (long long)expert_of(r, start_Z, E) * F;
  REAL squares = 0;
  for (int f = lane; f < F; f += WARP) squares = fma(h_F[f], h_F[f], squares);
  const REAL rstd = 1 / sqrt(sum_of_lanes(squares) / F + eps);
  for (int f = lane; f < F; f += WARP) h_F[f] = h_F[f] * rstd * w_F[f];
  if (lane == 0) rstd_R[r] = rstd;
}

// y[m] = sum over k of gate[m,k] * row[slot[m,k]], in the order of k, without the dropped. A warp has a sub-token.
// Work 2 R U FLOP; moves 4 (R U + M U) bytes: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) combine(
    const REAL* y_RU, const REAL* gate_MK, const long long* slot_MK, int M, int K, int U, REAL* y_MU) {
  const int m = row_of_warp();
  if (m >= M) return;
  gate_MK += (long long)m * K, slot_MK += (long long)m * K;
  for (int u = threadIdx.x % WARP; u < U; u += WARP) {
    REAL sum = 0;
    for (int k = 0; k < K; ++k)
      if (slot_MK[k] >= 0) sum = fma(gate_MK[k], y_RU[slot_MK[k] * U + u], sum);
    y_MU[(long long)m * U + u] = sum;
  }
}

// ---- numpy_ref.experts.expert_ffn_backward ------------------------------------------------------------------------

// Back through the gate, the sub-norm and the activation; given a = dy @ down, which is overwritten:
//   dgate = a . n;  dn = gate a;  and gate n, which the gradient of `down` wants, takes n's place;
//   with a sub-norm, n^ = h rstd:  dh = rstd (dn w - n^ mean(dn w n^)),  and dn n^, summed over rows by
//   `sub_norm_gradient`, takes a's place;
//   dgate_proj = dh up act'(gate),  dup = dh act(gate).
// acting: n is given, as what its quantised values act as; otherwise computed again.
// Work about 20 R F FLOP and 2 R F activations; moves 4 (a, twice, gate and up, twice, n, their gradients) = 28 R F bytes,
// the second readings mostly from caches: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) rows_backward(
    const long long* start_Z, int E, int bound, int F, bool silu, bool normed, bool acting, const long long* route_R,
    const REAL* gate_MK, const REAL* sub_norm_EF, const REAL* rstd_R, const REAL* gate_up_R2F, REAL* a_RF, REAL* n_RF,
    REAL* dgate_up_R2F, REAL* dgate_R) {
  const int r = row_of_warp(), lane = threadIdx.x % WARP;
  if (r >= bound || r >= start_Z[E]) return;
  const REAL *gate_F = gate_up_R2F + 2LL * r * F, *up_F = gate_F + F;
  const REAL* w_F = sub_norm_EF + (normed ? (long long)expert_of(r, start_Z, E) * F : 0);
  REAL *a_F = a_RF + (long long)r * F, *n_F = n_RF + (long long)r * F, *dgate_F = dgate_up_R2F + 2LL * r * F;
  const REAL gate = gate_MK[route_R[r]], rstd = normed ? rstd_R[r] : REAL(1);

  REAL dgate = 0, pull = 0;
  for (int f = lane; f < F; f += WARP) {
    const REAL hat = gated(gate_F[f], up_F[f], silu) * rstd, w = normed ? w_F[f] : REAL(1);
    const REAL n = acting ? n_F[f] : hat * w;
    dgate = fma(a_F[f], n, dgate);
    if (normed) pull = fma(gate * a_F[f] * w, hat, pull);
    n_F[f] = gate * n;
  }
  dgate = sum_of_lanes(dgate);
  if (lane == 0) dgate_R[r] = dgate;
  if (normed) pull = sum_of_lanes(pull) / F;

  for (int f = lane; f < F; f += WARP) {
    const REAL up = up_F[f];
    const auto [act, slope] = activated(silu, gate_F[f]);
    REAL dh = gate * a_F[f];
    if (normed) {
      const REAL hat = act * up * rstd, dn = dh;
      a_F[f] = dn * hat;
      dh = rstd * (dn * w_F[f] - hat * pull);
    }
    dgate_F[f] = dh * up * slope;
    dgate_F[F + f] = dh * act;
  }
}

// dsub_norm[e] += the sum of s over e's rows, s[r] = dn n^ (see `rows_backward`): line y of a block adds every 16th row,
// then the 16 sums are added in order.
// Work R F additions; moves 4 (R F + 2 E F) bytes: bound by memory.
extern "C" __global__ void __launch_bounds__(COLUMNS * LINES) sub_norm_gradient(
    const REAL* s_RF, const long long* start_Z, int F, REAL* dsub_norm_EF) {
  __shared__ REAL sums[LINES][COLUMNS];
  const int columns = (F + COLUMNS - 1) / COLUMNS, e = blockIdx.x / columns;
  const int f = blockIdx.x % columns * COLUMNS + threadIdx.x, end = (int)start_Z[e + 1];
  REAL sum = 0;
  if (f < F)
    for (int r = (int)start_Z[e] + threadIdx.y; r < end; r += LINES) sum += s_RF[(long long)r * F + f];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || f >= F) return;
  for (int line = 1; line < LINES; ++line) sum += sums[line][threadIdx.x];
  dsub_norm_EF[(long long)e * F + f] += sum;
}

// dx[m] = the sum of its rows' dx, in the order of k, and dgate[m,k] = its row's; both without the dropped, whose dgate is
// 0. The rows of y[m] = sum over k of gate[m,k] Expert(x[m]) all take the same x.
// Work R U additions; moves 4 (R U + M U) bytes: bound by memory.
extern "C" __global__ void __launch_bounds__(THREADS) combine_backward(
    const REAL* dx_RU, const REAL* dgate_R, const long long* slot_MK, int M, int K, int U, REAL* dx_MU, REAL* dgate_MK) {
  const int m = row_of_warp(), lane = threadIdx.x % WARP;
  if (m >= M) return;
  dgate_MK += (long long)m * K, slot_MK += (long long)m * K;
  for (int k = lane; k < K; k += WARP) dgate_MK[k] = slot_MK[k] < 0 ? REAL(0) : dgate_R[slot_MK[k]];
  for (int u = lane; u < U; u += WARP) {
    REAL sum = 0;
    for (int k = 0; k < K; ++k)
      if (slot_MK[k] >= 0) sum += dx_RU[slot_MK[k] * U + u];
    dx_MU[(long long)m * U + u] = sum;
  }
}
