// The gated activation of SwiGLU and of its squared-ReLU sibling.

constexpr int COLUMNS = 32, ROWS = 8;  // of a block: a warp has 32 neighbours of one row

template <class Activation> __device__ void gate(const REAL* gate_up_N2F, int N, int F, REAL* h_NF) {
  const int n = blockIdx.x * ROWS + threadIdx.y, f = blockIdx.y * COLUMNS + threadIdx.x;
  if (n >= N || f >= F) return;
  const REAL* gate_up_2F = gate_up_N2F + 2LL * n * F;
  h_NF[(long long)n * F + f] = activated(Activation(), gate_up_2F[f]).value * gate_up_2F[F + f];
}

template <class Activation>
__device__ void gate_backward(const REAL* dh_NF, const REAL* gate_up_N2F, int N, int F, REAL* dgate_up_N2F) {
  const int n = blockIdx.x * ROWS + threadIdx.y, f = blockIdx.y * COLUMNS + threadIdx.x;
  if (n >= N || f >= F) return;
  const long long row = 2LL * n * F;
  const Activated act = activated(Activation(), gate_up_N2F[row + f]);
  const REAL dh = dh_NF[(long long)n * F + f];
  dgate_up_N2F[row + f] = dh * gate_up_N2F[row + F + f] * act.slope;
  dgate_up_N2F[row + F + f] = dh * act.value;
}

// numpy_ref.feed_forward.gated_activation: h = act(gate) up. Grid: (blocks of rows, of columns).
// Work N F exponentials, 3 N F multiplications; 3 N F numbers, 12 bytes of float32 for some 30 instructions: bound by
// memory.
extern "C" __global__ void __launch_bounds__(COLUMNS * ROWS)
silu_gate(const REAL* gate_up_N2F, int N, int F, REAL* h_NF) { gate<Silu>(gate_up_N2F, N, F, h_NF); }

extern "C" __global__ void __launch_bounds__(COLUMNS * ROWS)
relu2_gate(const REAL* gate_up_N2F, int N, int F, REAL* h_NF) { gate<Relu2>(gate_up_N2F, N, F, h_NF); }

// numpy_ref.feed_forward.gated_activation_backward: h = act(g) u, hence dg = dh u act'(g) and du = dh act(g).
// Work N F exponentials, 7 N F multiplications; 5 N F numbers, 20 bytes of float32 for some 40 instructions: bound by
// memory.
extern "C" __global__ void __launch_bounds__(COLUMNS * ROWS)
silu_gate_backward(const REAL* dh_NF, const REAL* gate_up_N2F, int N, int F, REAL* dgate_up_N2F) {
  gate_backward<Silu>(dh_NF, gate_up_N2F, N, F, dgate_up_N2F);
}

extern "C" __global__ void __launch_bounds__(COLUMNS * ROWS)
relu2_gate_backward(const REAL* dh_NF, const REAL* gate_up_N2F, int N, int F, REAL* dgate_up_N2F) {
  gate_backward<Relu2>(dh_NF, gate_up_N2F, N, F, dgate_up_N2F);
}
