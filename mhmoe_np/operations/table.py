"""The closed table of operations: what a backend offers, said once.

The model names these operations and never a backend. `numpy_ref` defines each of them in plain NumPy;
`numba_cpu` computes the same, fast. An operation that differentiates has its backward beside it, and
all backwards keep two laws:

- gradients of activations are returned, in the order of the forward's differentiable arguments; where
  an array `onto` is given they are added to it, which is then what is returned;
- gradients of weights are *added* to the array given (`dw_OI` and the like), so that tied weights and
  accumulated micro-batches need no special case.

A linear map, an expert's too, takes its weights as floats, as a `BitWeight` or as a `PackedWeight`. The
last two make it a BitLinear (spec 5): its input rows are quantised to 8 bits, the product is one of
integers and exact, and both give the same bits. Backwards exist for the first two; a BitWeight's is
straight-through: the quantisers and scales count as constants.

Arrays are C-contiguous, of one float dtype (float32 or float64) per call, unless said otherwise. No
operation changes its inputs except where its name or text says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from numpy.typing import DTypeLike

from mhmoe_np.operations.packing import PackedMatrices
from mhmoe_np.types import BoolArray, FloatArray, IntArray

Activation = Literal["silu", "relu2"]
Quantization = Literal["bitnet_b158", "bitnet"]
BackendName = Literal["numpy", "numba"]


class BitWeight(NamedTuple):
    """Quantised weights beside the float ones they come from: integers kept as floats, and scales.

    The weight that acts is beta * w, row by row. Joined matrices have a beta each, so beta is said
    for every output row. A forward may use the packed form instead, with the same bits.
    """

    w: FloatArray  # -1, 0 or +1: [O, I], or [E, O, I] for experts
    beta: FloatArray  # [O], or [E, O]
    packed: PackedMatrices | None = None  # the same integers


class PackedWeight(NamedTuple):
    """The same without the float weights: packed integers and scales, for the forward alone."""

    w: PackedMatrices
    beta: FloatArray  # [E, O], E = 1 for a single matrix


Weight: TypeAlias = FloatArray | BitWeight | PackedWeight
"""A linear map's weights: what they are decides how the map is computed (spec 2 or spec 5)."""

LayerWeights: TypeAlias = Mapping[str, Any]
"""One layer's arrays by name: a `Weight` for each linear map, floats for norms and biases."""


class Routing(NamedTuple):
    """What the router decided for each sub-token."""

    p_ME: FloatArray  # softmax over all experts
    log_sum_exp_M: FloatArray  # of the logits, for the z-loss
    expert_MK: IntArray  # the chosen experts, most probable first
    gate_MK: FloatArray  # their weights


class Dispatch(NamedTuple):
    """Where each choice goes: rows sorted by expert, first choices before second ones."""

    route_R: IntArray  # row -> flat index s*K + j of the choice it carries
    slot_MK: IntArray  # choice -> row, or -1 where capacity dropped it
    start_Z: IntArray  # rows start_Z[e] .. start_Z[e+1]-1 belong to expert e


class ExpertCache(NamedTuple):
    """What `expert_ffn_backward` needs of the forward."""

    gate_up_R2F: FloatArray  # both projections, before the activation
    rstd_R: FloatArray | None  # of the sub-norm, where there is one


class AdamWSettings(NamedTuple):
    """The optimiser's numbers for one update (spec 6)."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


class Operations(Protocol):
    """One backend: every operation of the table.

    Attributes:
        prefers_packed: whether forwards are faster with packed integers than with floats.
    """

    @property
    def prefers_packed(self) -> bool: ...  # noqa: D102

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """An uninitialised array. A backend that owns a workspace hands out its buffers."""

    def scope(self) -> AbstractContextManager[None]:
        """Arrays that operations return inside this context may be reused once it ends."""

    def buffer_bytes(self) -> int:
        """How many bytes of a workspace were ever handed out at once; 0 where there is none."""

    # ---- linear maps -------------------------------------------------------------------------

    def linear(self, x_NI: FloatArray, w_OI: Weight, b_O: FloatArray | None) -> FloatArray:
        """y_NO = x @ w.T (+ b); quantised: (q @ w.T) * (beta * gamma/127) (+ b), q = quantised x.

        Source   [spec 1] every linear is stored [out, in] and applied as x @ W.T; [spec 5].
        """

    def linear_backward(
        self,
        dy_NO: FloatArray,
        x_NI: FloatArray,
        w_OI: Weight,
        dw_OI: FloatArray,
        db_O: FloatArray | None,
        *,
        onto_NI: FloatArray | None = None,
    ) -> FloatArray:
        """Return dx_NI; add to dw_OI and db_O.

        Source   [spec 5] straight-through: dx = dy @ (beta w), dW = dy^T @ (q gamma/127).
        Raises TypeError: the weight is packed.
        """

    def embedding(self, id_N: IntArray, w_VD: FloatArray) -> FloatArray:
        """x_ND = w[id]."""

    def embedding_backward(self, dx_ND: FloatArray, id_N: IntArray, dw_VD: FloatArray) -> None:
        """Add each row of dx_ND to row id of dw_VD."""

    # ---- quantisation ------------------------------------------------------------------------

    def quantise_rows(self, x_NI: FloatArray) -> tuple[FloatArray, FloatArray]:
        """8-bit integers, kept as floats, and each row's scale: return q_NI and gamma/127 as scale_N.

        gamma = max(max|x|, 1e-5);  q = clip(round(x * (127/gamma)), -128, 127), halves to even.
        Every backend gives the same bits. A row with a NaN has a NaN scale.

        Source   [spec 5], [B1 eq. 4], [B2].
        """

    def quantise_weight(
        self,
        w_OI: FloatArray,
        start_Z: IntArray,
        *,
        quantization: Quantization,
        q_OI: FloatArray,
        beta_O: FloatArray,
    ) -> IntArray:
        """Quantise joined matrices: rows start_Z[x] .. start_Z[x+1]-1 of w_OI are matrix x.

        bitnet_b158: beta = max(mean|W|, 1e-5), q = clip(round(W * (1/beta)), -1, 1).
        bitnet: the same beta, q = +1 where W - mean(W) > 0, else -1.
        The sum of a mean is the exact one, rounded once to float64, so that no order is part of the
        definition and every backend gives the same bits. A matrix with a number that is not finite has
        a beta of NaN.

        Overwrites q_OI and beta_O (each row has its matrix's beta). Returns for every matrix how many
        of q are -1, 0 and +1, and how many differ from what q_OI held: [matrices, 4].

        Source   [spec 5], [B1 eq. 1-3], [B2].
        """

    def pack_in_place(self, q_EOI: FloatArray, packed: PackedMatrices) -> None:
        """Overwrite packed's codes by these integers, which its format must have (see `packing`)."""

    # ---- normalisation -----------------------------------------------------------------------

    def rms_norm(
        self, x_ND: FloatArray, w_D: FloatArray, *, eps: float
    ) -> tuple[FloatArray, FloatArray]:
        """y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps); return y_ND and rstd_N.

        Source   [spec 2] RMSNorm.
        """

    def add_in_place_and_norm(
        self, x_ND: FloatArray, branch_ND: FloatArray, w_D: FloatArray, *, eps: float
    ) -> tuple[FloatArray, FloatArray]:
        """branch += x, in place; return what `rms_norm` makes of that sum.

        The backward is that of the norm, onto the gradient that the sum receives elsewhere.
        """

    def rms_norm_backward(
        self,
        dy_ND: FloatArray,
        x_ND: FloatArray,
        w_D: FloatArray,
        rstd_N: FloatArray,
        dw_D: FloatArray,
        *,
        onto_ND: FloatArray | None = None,
    ) -> FloatArray:
        """Return dx_ND; add to dw_D."""

    # ---- attention ---------------------------------------------------------------------------

    def rotate_in_place(self, x_BTAC: FloatArray, cos_TJ: FloatArray, sin_TJ: FloatArray) -> None:
        """Turn each pair (x[j], x[j + C/2]) by its angle: rotary positions in HF's rotate-half form.

        x_BTAC may be a view with any strides but a contiguous last axis. The backward of a rotation
        is the rotation by the opposite angle: the same operation with -sin_TJ.

        Source   [spec 2] RoPE.
        """

    def attention(
        self, q_BTAC: FloatArray, k_BSGC: FloatArray, v_BSGC: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Causal softmax(q k^T / sqrt(C)) v; return out_BTAC and the rows' log-sum-exp_BAT.

        The T queries are the last T of the S positions: query t sees keys 0 .. S-T+t. Attention head
        a reads key/value head a // (A/G). The inputs may be views of one joint projection.

        Source   [spec 2] attention.
        """

    def attention_backward(
        self,
        dout_BTAC: FloatArray,
        q_BTAC: FloatArray,
        k_BTGC: FloatArray,
        v_BTGC: FloatArray,
        out_BTAC: FloatArray,
        log_sum_exp_BAT: FloatArray,
        dq_BTAC: FloatArray,
        dk_BTGC: FloatArray,
        dv_BTGC: FloatArray,
    ) -> None:
        """Write (not add) the gradients into dq, dk and dv, which may be views; here S = T."""

    # ---- feed-forward ------------------------------------------------------------------------

    def gated_activation(self, gate_up_N2F: FloatArray, *, activation: Activation) -> FloatArray:
        """h_NF = act(gate) * up, gate being the first F columns and up the last F.

        silu(z) = z * sigmoid(z), relu2(z) = max(z, 0)^2.

        Source   [spec 2] FFN.
        """

    def gated_activation_backward(
        self, dh_NF: FloatArray, gate_up_N2F: FloatArray, *, activation: Activation
    ) -> FloatArray:
        """Return dgate_up_N2F."""

    # ---- routing and experts -----------------------------------------------------------------

    def route(self, logits_ME: FloatArray, *, top_k: int, normalise: bool) -> Routing:
        """Softmax over all experts, the K largest, ties to the lower index, gates as in the spec.

        gate = p of the chosen, divided by their sum where `normalise`.

        Source   [spec 3], [P2 eq. 3-5].
        """

    def route_backward(
        self,
        dgate_MK: FloatArray,
        dp_E: FloatArray,
        dlog_sum_exp_M: FloatArray,
        routing: Routing,
        counted_M: BoolArray,
        *,
        normalise: bool,
    ) -> FloatArray:
        """Return dlogits_ME.

        dp_E is the gradient that every counted sub-token's p receives from the balance loss;
        dlog_sum_exp_M comes from the z-loss. The choice itself carries no gradient.
        """

    def dispatch(self, expert_MK: IntArray, *, experts: int, capacity: int | None) -> Dispatch:
        """Sort the choices by expert; keep at most `capacity` of each expert's (None: all).

        An expert's rows are in filling order: all first choices in sub-token order, then all second
        ones. Integers only, no gradient.

        Source   [spec 4] capacity.
        """

    def expert_ffn(
        self,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        gate_up_E2FU: Weight,
        down_EUF: Weight,
        sub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
        eps: float,
    ) -> tuple[FloatArray, ExpertCache]:
        """y[s] = sum_j gate[s, j] * Expert_{I[s, j]}(x[s]); dropped choices add nothing.

        Expert(x) = down(norm(act(gate(x)) * up(x))), the norm only where sub_norm_EF is given.

        Source   [P1 eq. 2-3], [spec 3].
        """

    def expert_ffn_backward(
        self,
        dy_MU: FloatArray,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        gate_up_E2FU: Weight,
        down_EUF: Weight,
        sub_norm_EF: FloatArray | None,
        cache: ExpertCache,
        dgate_up_E2FU: FloatArray,
        ddown_EUF: FloatArray,
        dsub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
    ) -> tuple[FloatArray, FloatArray]:
        """Return dx_MU and dgate_MK (0 where dropped); add to the three weight gradients.

        Raises TypeError: the weights are packed.
        """

    # ---- loss --------------------------------------------------------------------------------

    def token_nll(self, x_ND: FloatArray, w_VD: FloatArray, target_N: IntArray) -> FloatArray:
        """nll[n] = logsumexp(logits[n]) - logits[n, target[n]], logits = x @ w.T; 0 where target < 0.

        Source   [spec 4] NLL; nats.
        """

    def token_nll_and_gradient(
        self,
        x_ND: FloatArray,
        w_VD: FloatArray,
        target_N: IntArray,
        dw_VD: FloatArray,
        *,
        dnll: float,
    ) -> tuple[FloatArray, FloatArray]:
        """`token_nll` and its backward in one pass: return nll_N and dx_ND, add to dw_VD.

        Every counted token's NLL has the same upstream gradient `dnll` (1 / number of targets for a
        mean), known beforehand; so the [N, V] logits need never be kept for a second pass.
        """

    # ---- optimiser ---------------------------------------------------------------------------

    def sum_of_squares(self, x_P: FloatArray) -> float:
        """The sum of x^2, in float64, in an order that depends on P alone."""

    def adamw_in_place(
        self,
        parameter_P: FloatArray,
        gradient_P: FloatArray,
        first_moment_P: FloatArray,
        second_moment_P: FloatArray,
        *,
        step: int,
        gradient_scale: float,
        settings: AdamWSettings,
    ) -> None:
        """One AdamW update with decoupled decay; scales the gradient first and zeroes it after.

        step counts from 1. m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
        p = p - lr * (decay * p + (m / (1-b1^step)) / (sqrt(v / (1-b2^step)) + epsilon)).

        Source   [spec 6]; Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
        """
