// Writing integers into their packed form (see `packing.py`): panels of 16 outputs, groups of 4*depth inputs, a word
// of 32 bits for the inputs of one output in one group.

constexpr int PANEL = 16, PLACES = 4;

struct alignas(16) Four { REAL at[PLACES]; };

// Codes of the four inputs from i on, one in each byte; beyond the matrix 0.
template <bool SIGN> __device__ unsigned codes_of_quad(const REAL* q_I, int i, int I, bool aligned) {
  Four q = {};
  if (aligned && i < I) {
    q = *(const Four*)(q_I + i);
  } else {
    #pragma unroll
    for (int place = 0; place < PLACES; ++place) q.at[place] = i + place < I ? q_I[i + place] : (REAL)-1;
  }
  unsigned codes = 0;
  #pragma unroll
  for (int place = 0; place < PLACES; ++place) {
    const unsigned code = q.at[place] > 0 ? (SIGN ? 1 : 2) : SIGN || q.at[place] < 0 ? 0 : 1;
    if (i + place < I) codes |= code << 8 * place;
  }
  return codes;
}

// The word of one output and group. depth: codes in a byte, 4 for ternary-2bit, 5 for ternary-base3, 8 for sign-1bit.
__device__ unsigned word_of_group(const REAL* q_I, int group, int depth, int I, bool aligned) {
  const int i = group * depth * PLACES;
  unsigned word = 0;
  if (depth == 4) {
    #pragma unroll
    for (int quad = 0; quad < 4; ++quad) word |= codes_of_quad<false>(q_I, i + quad * PLACES, I, aligned) << 2 * quad;
  } else if (depth == 8) {
    #pragma unroll
    for (int quad = 0; quad < 8; ++quad) word |= codes_of_quad<true>(q_I, i + quad * PLACES, I, aligned) << quad;
  } else {
    unsigned value = 0;  // a number in base 3 in each byte: at most 242
    #pragma unroll
    for (int quad = 0; quad < 5; ++quad) value = 3 * value + codes_of_quad<false>(q_I, i + quad * PLACES, I, aligned);
    #pragma unroll
    for (int place = 0; place < PLACES; ++place)
      word |= (256 * (value >> 8 * place & 255) + 242) / 243 << 8 * place;
  }
  return word;
}

// numpy_ref.quantise.pack_in_place. A block packs 32 groups of one panel: a warp reads along a row, 64 bytes and more a
// lane; the words change places in shared memory and are written as they lie.
// Work E O I comparisons; reads 4 E O I bytes, writes E O I / 4, / 5 or / 8: bound by memory.
extern "C" __global__ void __launch_bounds__(WARP * PANEL) pack(const REAL* q_EOI, int panels, int O, int I, int groups,
                                                                int depth, unsigned char* code) {
  __shared__ unsigned words[WARP][PANEL + 1];
  const int runs = (groups + WARP - 1) / WARP;
  const int matrix_panel = blockIdx.x / runs, first_group = (int)(blockIdx.x % runs) * WARP;
  const int e = matrix_panel / panels, o = matrix_panel % panels * PANEL + threadIdx.y;
  const int group = first_group + threadIdx.x;
  const bool aligned = I % PLACES == 0 && (unsigned long long)q_EOI % sizeof(Four) == 0;
  unsigned word = 0;
  if (o < O && group < groups) word = word_of_group(q_EOI + ((long long)e * O + o) * I, group, depth, I, aligned);
  words[threadIdx.x][threadIdx.y] = word;
  __syncthreads();
  const int t = threadIdx.y * WARP + threadIdx.x, g = t / PANEL;
  unsigned* code_of_run = (unsigned*)code + ((long long)matrix_panel * groups + first_group) * PANEL;
  if (first_group + g < groups) code_of_run[t] = words[g][t % PANEL];
}

// scale = beta, but NaN for a row of integers of which one is not finite: codes cannot say so [D12]. A warp has a row.
// Work E O I comparisons; reads 4 E O I bytes: bound by memory.
extern "C" __global__ void __launch_bounds__(WARP * PANEL)
scale_of_rows(const REAL* q_EOI, const REAL* beta_EO, long long rows, int I, REAL* scale_EO) {
  const long long row = (long long)blockIdx.x * PANEL + threadIdx.y;
  if (row >= rows) return;
  REAL nothing = 0;  // 0 times a number, which is 0 unless that is not finite
  for (int i = threadIdx.x; i < I; i += WARP) nothing += 0 * q_EOI[row * I + i];
  nothing = sum_of_lanes(nothing);
  if (threadIdx.x == 0) scale_EO[row] = beta_EO[row] + nothing;
}
