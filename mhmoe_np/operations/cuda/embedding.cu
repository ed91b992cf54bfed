// The embedding: rows by id, and the way back.

constexpr int ROWS = 8;     // of a block
constexpr int COLUMNS = 2;  // of a lane
constexpr int AHEAD = 8;    // rows of the gradient that are read before the first of them is added

// numpy_ref.linear.embedding: x[n] = w[id[n]]. A warp has a row.
// Work none; moves 8 N D + 8 N bytes: bound by memory, 34 us for 16,384 rows of 768.
extern "C" __global__ void __launch_bounds__(ROWS * WARP)
    embedding(const long long* id_N, const REAL* w_VD, int N, int D, REAL* x_ND) {
  const int n = blockIdx.x * ROWS + threadIdx.y;
  if (n >= N) return;
  const REAL* w_D = w_VD + id_N[n] * D;
  REAL* x_D = x_ND + (long long)n * D;
#pragma unroll 8
  for (int d = threadIdx.x; d < D; d += WARP) x_D[d] = w_D[d];
}

// numpy_ref.linear.embedding_backward: dw[id[n]] += dx[n], each id's rows in order. Row r of the sorted ones is row
// route_R[r] of dx; rows start_Z[v] .. start_Z[v+1]-1 have the id v. A warp has WARP * COLUMNS columns of all rows of one
// id: it is the one that finds itself at the first of them.
// Work N D additions; moves at most 12 N D + 24 N bytes: 1/12 FLOP/byte, bound by memory, 50 us for 16,384 rows of 768.
// An id that has many rows takes some 0.1 us for each of them.
extern "C" __global__ void __launch_bounds__(ROWS * WARP)
    embedding_backward(const REAL* dx_ND, const long long* id_N, const long long* route_R, const long long* start_Z, int N,
                       int D, REAL* dw_VD) {
  const int r = blockIdx.x * ROWS + threadIdx.y, lane = threadIdx.x;
  if (r >= N) return;
  const long long id = id_N[route_R[r]];
  if (start_Z[id] != r) return;
  const int last = (int)start_Z[id + 1];
  const int first_column = blockIdx.y * WARP * COLUMNS + lane;
  REAL* dw_D = dw_VD + id * D;

  REAL sum[COLUMNS], ahead[AHEAD][COLUMNS];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const int d = first_column + c * WARP;
    sum[c] = d < D ? dw_D[d] : REAL(0);
  }
  for (int first = r; first < last; first += WARP) {
    const int rows = min(WARP, last - first);
    const int mine = lane < rows ? (int)route_R[first + lane] : 0;
    for (int begin = 0; begin < rows; begin += AHEAD) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int n = __shfl_sync(ALL_LANES, mine, begin + i);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          const int d = first_column + c * WARP;
          ahead[i][c] = begin + i < rows && d < D ? dx_ND[(long long)n * D + d] : REAL(0);
        }
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
          if (begin + i < rows) sum[c] += ahead[i][c];
    }
  }
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const int d = first_column + c * WARP;
    if (d < D) dw_D[d] = sum[c];
  }
}
