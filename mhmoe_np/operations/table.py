r"""The closed table of operations: what a backend offers, said once.

The model names these operations and never a backend. `numpy_ref` defines each of them in plain NumPy;
`numba_cpu` computes the same, fast. An operation that differentiates has its backward beside it, and
all backwards keep two laws:

- gradients of activations are returned, in the order of the forward's differentiable arguments; where
  an array `onto` is given they are added to it, which is then what is returned;
- gradients of weights are *added* to the array given (`dw_OI` and the like), so that tied weights and
  accumulated micro-batches need no special case.

Where arrays live
    Every array that an operation takes or gives is the backend's own, in the memory where it computes:
    parameters, their gradient, the optimiser's moments, quantised weights, rotary tables, activations,
    the key-value cache, the sums of a step. The backend allocates them: `empty` (scratch and results,
    from its workspace if it has one; given back when the surrounding `scope` ends) and `zeros` (what
    stays). On the host, as NumPy's, stay configuration, files, initial values, batches until they go
    through the model, whatever is sampled, logged or saved. Arrays cross by two doors, `to_device` and
    `to_host` (packed weights by `packed_to_device` and `packed_to_host`). `to_host` waits for all that
    is still being computed: a training step does so once, to read its sums (`model.sums`).

    Between operations the model may take views of the backend's arrays (basic slices, `reshape`), copy
    one into another (`x[...] = y`) and fill one with a number (`x[...] = 0`); every other computation
    is an operation of this table. `tests/strict_backend.py` refuses anything else.

Weights
    A linear map, an expert's too, takes its weights as floats, as a `BitWeight`, as a `PackedWeight` or
    as an `Int8Weight`. The second and third make it a BitLinear (spec 5): its input rows are quantised
    to 8 bits, the product is of integers and exact, and both give the same bits. Backwards exist for
    the first two; a BitWeight's is straight-through: the quantisers and scales count as constants. How
    packed codes lie in memory is the backend's affair; in files it is `packing`'s layout. An
    `Int8Weight` has 8-bit integers with a scale for each block of 32 inputs, of any model; the inputs
    are quantised likewise. A `BFloat16Weight` is a single matrix, as an output head. The cuda backend
    refuses the last two.

How to read an entry
    Shapes   arguments by their suffixes (`types.DIMENSIONS`; each letter one size within a call), then
             `->` and what is returned; a question mark: may be None.
    Dtypes   `float`: one float dtype (float32 or float64) for all arrays of the call but those that
             follow with a dtype of their own.
    Views    arguments that may be views with any strides but a contiguous last axis. All others are
             C-contiguous.
    Equation what is computed, in LaTeX; `\\` separates formulas. Index letters are those of the axes.
    Cost     multiply-adds of the products (or elementwise steps), and numbers read + written; forward,
             and `backward` beside the operation that it belongs to. Quantised products count alike.
    `checked.Checked` holds every call to Shapes, Dtypes and Views: in tests and in `gradcheck`.

No operation changes its inputs except where its name or text says so. None hides a number that is not
finite: what depends on one is not finite either, and indices are valid and different all the same
[D12].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.operations.bfloat16 import BFloat16Weight
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.packing import FormatName, PackedMatrices
from mhmoe_np.types import BoolArray, FloatArray, IntArray

Activation = Literal["silu", "relu2"]
Quantization = Literal["bitnet_b158", "bitnet"]
BackendName = Literal["numpy", "numba", "cuda"]


class BitWeight(NamedTuple):
    """Quantised weights beside the float ones they come from: integers kept as floats, and scales.

    The weight that acts is beta * w, row by row. Joined matrices have a beta each, so beta is said
    for every output row. A forward may use the packed form instead, with the same bits.
    """

    w: FloatArray  # -1, 0 or +1: [O, I], or [E, O, I] for experts
    beta: FloatArray  # [O], or [E, O]
    packed: PackedMatrices | None = None  # the same integers

    @property
    def shape(self) -> tuple[int, ...]:
        """[O, I], or [E, O, I] for experts."""
        shape: tuple[int, ...] = self.w.shape
        return shape


class PackedWeight(NamedTuple):
    """The same without the float weights: packed integers and scales, for the forward alone."""

    w: PackedMatrices
    beta: FloatArray  # [E, O], E = 1 for a single matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, O, I], E = 1 for a single matrix."""
        return self.beta.shape[0], self.w.outputs, self.w.inputs


Weight: TypeAlias = FloatArray | BitWeight | PackedWeight | Int8Weight | BFloat16Weight
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


class RouterSums(NamedTuple):
    """One MoE layer's router statistics: sums over the counted sub-tokens, in float64."""

    first_choice_E: FloatArray  # how many chose e first
    choice_E: FloatArray  # how many chose e at all, before any is dropped
    p_E: FloatArray  # added up in p's own dtype
    dropped_E: FloatArray  # choices of e beyond its capacity
    squared_log_sum_exp_1: FloatArray


class RouterLosses(NamedTuple):
    """What the balance loss and the z-loss send back into one layer's router, over the whole batch."""

    count_E: FloatArray  # float64: how often e was chosen, first or at all; a constant of the gradient
    choices: int  # sum of count_E
    sub_tokens: int  # counted ones
    daux: float
    dz: float


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
    clip_norm: float  # of the whole gradient

    def update(self, step: int) -> NDArray[np.float64]:
        """What `adamw_in_place` is given for one update: these, then 1 - beta^step of both betas.

        step: counts from 1.

        Shapes   -> update_8
        Source   [spec 6 AdamW]
        """
        return np.array([*self, 1 - self.beta1**step, 1 - self.beta2**step])


class AttentionBranch(NamedTuple):
    """The attention half of a layer, as a step of decoding reads it."""

    norm_D: FloatArray
    qkv_QD: Weight
    sub_norm_I: FloatArray | None
    out_DI: Weight
    kv_BS2GC: FloatArray  # the layer's cache: keys, then values


class FeedForwardBranch(NamedTuple):
    """The dense feed-forward half of a layer."""

    norm_D: FloatArray
    gate_up_2FD: Weight
    sub_norm_F: FloatArray | None
    down_DF: Weight


Branch: TypeAlias = AttentionBranch | FeedForwardBranch
"""What a pre-norm layer adds to x: branch(norm(x))."""

JoinedStep: TypeAlias = Callable[[FloatArray, FloatArray, FloatArray, IntArray], None]
"""See `Operations.joined_step`."""


class Device(NamedTuple):
    """A device whose memory is not the host's."""

    name: str
    driver: str  # the CUDA version that the driver is for
    library: str  # name and version
    free_bytes: int
    total_bytes: int


class Blas(NamedTuple):
    """The library that multiplies a backend's matrices on the host."""

    name: str  # as threadpoolctl calls it: openblas, mkl, ...
    version: str
    architecture: str | None  # that its kernels are for, where it says so


class Operations(Protocol):
    """One backend: every operation of the table.

    Attributes:
        name: which it is.
        prefers_packed: whether forwards are faster with packed integers than with floats.
    """

    @property
    def name(self) -> BackendName: ...  # noqa: D102

    @property
    def prefers_packed(self) -> bool: ...  # noqa: D102

    # ---- memory ------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """An uninitialised array. A backend that owns a workspace hands out its buffers."""

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """An array of zeros that stays: never of a workspace."""

    def empty_packed(
        self, experts: int, outputs: int, inputs: int, format: FormatName
    ) -> PackedMatrices:
        """Room for packed matrices that stay, in the layout that this backend reads."""

    def scope(self) -> AbstractContextManager[None]:
        """Arrays that operations return inside this context may be reused once it ends."""

    def buffer_bytes(self) -> int:
        """How many bytes of a workspace were ever handed out at once; 0 where there is none."""

    def device(self) -> Device | None:
        """Where it computes, as it stands now; None: on the host."""

    def blas(self) -> Blas | None:
        """The library of its matrix products; None: they are computed on a device."""

    def repeated(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, which computes on the device, as a function of the host's arrays.

        Called with (fixed, *arrays) it takes the arrays to the device, all in one go, and returns what
        work(fixed, *arrays there) does, which is valid until the next operation. A backend may record
        what `work` has the device do and, given the same `fixed` and arrays of the same shapes, have
        it done again without calling `work`: what changes from call to call must come in by the arrays.
        """

    def joined_step(
        self, branches: Sequence[Branch], *, activation: Activation, eps: float
    ) -> JoinedStep | None:
        """x <- x + branch(norm(x)), branch after branch, as one piece of work on one token a sequence.

        None: this backend does not join such branches; their operations are called one by one. They
        define what is computed, to the rounding of sums in another order.

        Called with (x_BD, cos_YJ, sin_YJ, first_1), all the backend's, it changes x_BD, and puts keys
        and values behind the first_1[0] positions of the caches.
        """

    def to_device(self, array: NDArray[Any]) -> Any:
        """NumPy's array as the backend's: itself, or a copy in another memory."""

    def to_host(self, array: Any) -> NDArray[Any]:
        """The backend's array as NumPy's: itself, or a copy. Waits for what is still being computed."""

    def packed_to_device(self, packed: PackedMatrices) -> PackedMatrices:
        """Packed matrices in `packing`'s layout, as this backend reads them."""

    def packed_to_host(self, packed: PackedMatrices) -> PackedMatrices:
        """This backend's packed matrices in `packing`'s layout, as NumPy's array."""

    # ---- sums --------------------------------------------------------------------------------

    def add_in_place(self, x_ND: FloatArray, onto_ND: FloatArray) -> None:
        r"""onto += x: a residual, and the gradient of something used twice.

        Equation \mathrm{onto}_{nd} \leftarrow \mathrm{onto}_{nd} + x_{nd}
        Shapes   x_ND, onto_ND
        Dtypes   float
        Source   [spec 2 pre-norm] x + f(x)
        Cost     N*D additions; 3 N*D numbers. The backward hands dy on to both.
        """

    def add_sum(self, x_N: FloatArray, total_1: FloatArray) -> None:
        r"""total += the sum of x, added up in float64.

        Equation \mathrm{total} \leftarrow \mathrm{total} + \sum_n x_n
        Shapes   x_N, total_1
        Dtypes   float; float64 total_1
        Source   [spec 4 NLL]
        Cost     N additions; N numbers. The backward is `dnll` of `token_nll_and_gradient`.
        """

    # ---- linear maps -------------------------------------------------------------------------

    def linear(self, x_NI: FloatArray, w_OI: Weight, b_O: FloatArray | None) -> FloatArray:
        r"""y = x @ w.T (+ b); quantised: (q @ w.T) * (beta * gamma/127) (+ b), q = quantised x.

        An `Int8Weight` has integers w and a scale s of each block of 32 inputs, b; so have the rows of
        x, their integers q with scales t.

        Equation y_{no} = \sum_i x_{ni}\, w_{oi} + b_o \\
                 \text{quantised: } y_{no} = \left( \sum_i q_{ni}\, w_{oi} \right) \cdot \left( \beta_o
                   \cdot \frac{\gamma_n}{127} \right) + b_o \\
                 \text{in 8 bits: } y_{no} = \sum_b \left( \sum_{i \in b} q_{ni}\, w_{oi} \right)
                   \cdot \left( s_{ob}\, t_{nb} \right) + b_o
        Shapes   x_NI, w_OI, b_O? -> y_NO
        Dtypes   float
        Source   [spec 1 x @ W.T]; quantised [spec 5 integer product], [B1 eq. 11]; in 8 bits [spec 5
                 8-bit weights]
        Cost     N*I*O multiply-adds; N*I + O*I + N*O numbers (O*I/16 where packed to 2 bits, O*I*17/64
                 in 8 bits).
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
        r"""Return dx_NI; add to dw_OI and db_O.

        Equation \mathrm{d}x_{ni} = \sum_o \mathrm{d}y_{no}\, \hat w_{oi} \\
                 \mathrm{d}w_{oi} \leftarrow \mathrm{d}w_{oi} + \sum_n \mathrm{d}y_{no}\, \hat x_{ni} \\
                 \mathrm{d}b_o \leftarrow \mathrm{d}b_o + \sum_n \mathrm{d}y_{no} \\
                 \hat x_{ni} = x_{ni},\ \hat w_{oi} = w_{oi} \\
                 \text{quantised: } \hat x_{ni} = q_{ni} \cdot \frac{\gamma_n}{127},\ \hat w_{oi} =
                   \beta_o\, w_{oi}
        Shapes   dy_NO, x_NI, w_OI, dw_OI, db_O?, onto_NI? -> dx_NI
        Dtypes   float
        Raises   TypeError: the weight is packed.
        Source   [spec 1 x @ W.T]; quantised [spec 5 straight-through], [B1 section 2.2]:
                 dx = dy @ (beta w), dW = dy^T @ (q gamma/127)
        Cost     2 N*I*O multiply-adds; 2 N*O + 2 N*I + 3 O*I numbers.
        """

    def embedding(self, id_N: IntArray, w_VD: FloatArray) -> FloatArray:
        r"""x[n] = w[id[n]]. Ids outside 0 .. V-1 are the caller's fault: the model checks them.

        Equation x_{nd} = w_{\mathrm{id}(n),\, d}
        Shapes   id_N, w_VD -> x_ND
        Dtypes   float; int64 id_N
        Source   [spec 1 embed_tokens]
        Cost     no multiply-adds; 2 N*D numbers.
        """

    def embedding_backward(self, dx_ND: FloatArray, id_N: IntArray, dw_VD: FloatArray) -> None:
        r"""Add each row of dx_ND to row id of dw_VD, in the order of the rows.

        Equation \mathrm{d}w_{vd} \leftarrow \mathrm{d}w_{vd} + \sum_{n :\, \mathrm{id}(n) = v}
                   \mathrm{d}x_{nd}
        Shapes   dx_ND, id_N, dw_VD
        Dtypes   float; int64 id_N
        Source   [spec 1 embed_tokens]
        Cost     N*D additions; 3 N*D numbers.
        """

    # ---- quantisation ------------------------------------------------------------------------

    def quantise_rows(self, x_NI: FloatArray) -> tuple[FloatArray, FloatArray]:
        r"""8-bit integers, kept as floats, and each row's scale: return q_NI and gamma/127 as scale_N.

        gamma = max(max|x|, 1e-5);  q = clip(round(x * (127/gamma)), -128, 127), halves to even.
        Every backend gives the same bits. A row with a number that is not finite has such a scale.

        Equation \gamma_n = \max\left( \max_i |x_{ni}|,\ 10^{-5} \right) \\
                 q_{ni} = \mathrm{clip}\left( \mathrm{round}\left( x_{ni} \cdot \frac{127}{\gamma_n}
                   \right),\ -128,\ 127 \right) \\
                 \mathrm{scale}_n = \frac{\gamma_n}{127}
        Shapes   x_NI -> q_NI, scale_N
        Dtypes   float
        Source   [spec 5 activations], [B1 eq. 4-5]; by rows as in [B2]
        Cost     N*I multiplications; 3 N*I numbers. No backward of its own: straight-through.
        """

    def quantise_weight(
        self,
        w_OI: FloatArray,
        starts: tuple[int, ...],
        *,
        quantization: Quantization,
        q_OI: FloatArray,
        beta_O: FloatArray,
        report_X5: FloatArray,
    ) -> None:
        r"""Quantise joined matrices: rows starts[x] .. starts[x+1]-1 of w_OI are matrix x.

        bitnet_b158: beta = max(mean|W|, 1e-5), q = clip(round(W * (1/beta)), -1, 1).
        bitnet: the same beta, q = +1 where W - mean(W) > 0, else -1.
        The sum of a mean is the exact one, rounded once to float64, so that no order is part of the
        definition and every backend gives the same bits [D8]. A matrix with a number that is not finite
        has a beta of NaN.

        Overwrites q_OI, beta_O (each row has its matrix's beta) and report_X5: for every matrix its
        beta, how many of q are -1, 0 and +1, and how many differ from what q_OI held.

        Equation \beta = \max\left( \frac{1}{O I} \sum_{oi} |w_{oi}|,\ 10^{-5} \right) \\
                 \text{ternary: } q_{oi} = \mathrm{clip}\left( \mathrm{round}\left( w_{oi} \cdot
                   \frac{1}{\beta} \right),\ -1,\ 1 \right) \\
                 \text{sign: } q_{oi} = +1 \text{ where } w_{oi} - \frac{1}{O I} \sum_{o'i'} w_{o'i'} >
                   0, \text{ else } -1
        Shapes   w_OI, q_OI, beta_O, report_X5
        Dtypes   float; float64 report_X5
        Source   [spec 5 bitnet_b158 weights], [B2 eq. 1-3]; [spec 5 bitnet weights], [B1 eq. 1-3, 12]
        Cost     2 O*I additions, O*I multiplications; 4 O*I numbers. No backward: straight-through.
        """

    def pack_in_place(self, q_EOI: FloatArray, packed: PackedMatrices) -> None:
        r"""Overwrite packed's codes by these integers, which its format must have (see `packing`).

        Equation c = \frac{q - q_{\min}}{\mathrm{step}} \\
                 \text{2 bits: } \mathrm{byte} = \sum_{b=0}^{3} c_b\, 4^b \\
                 \text{1.6 bits: } \mathrm{byte} = \left\lceil \frac{256}{243} \sum_{b=0}^{4} c_b\,
                   3^{4-b} \right\rceil \\
                 \text{1 bit: } \mathrm{byte} = \sum_{b=0}^{7} c_b\, 2^b
        Shapes   q_EOI
        Dtypes   float
        Raises   ValueError: an integer that the format does not have; a backend need not look.
        Source   [spec 5 packed weights]
        Cost     no multiply-adds; E*O*I numbers read, 1, 1.6 or 2 bits each written. No gradient.
        """

    # ---- normalisation -----------------------------------------------------------------------

    def rms_norm(
        self, x_ND: FloatArray, w_D: FloatArray, *, eps: float
    ) -> tuple[FloatArray, FloatArray]:
        r"""y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps); return y_ND and rstd_N.

        Equation r_n = \left( \frac{1}{D} \sum_d x_{nd}^2 + \varepsilon \right)^{-1/2} \\
                 y_{nd} = x_{nd}\, r_n\, w_d
        Shapes   x_ND, w_D -> y_ND, rstd_N
        Dtypes   float
        Source   [spec 2 RMSNorm], [RMSNorm eq. 4]
        Cost     3 N*D multiply-adds; 2 N*D numbers.
        """

    def add_in_place_and_norm(
        self, x_ND: FloatArray, branch_ND: FloatArray, w_D: FloatArray, *, eps: float
    ) -> tuple[FloatArray, FloatArray]:
        r"""branch += x, in place; return what `rms_norm` makes of that sum.

        Equation \mathrm{branch}_{nd} \leftarrow \mathrm{branch}_{nd} + x_{nd} \\
                 r_n = \left( \frac{1}{D} \sum_d \mathrm{branch}_{nd}^2 + \varepsilon \right)^{-1/2} \\
                 y_{nd} = \mathrm{branch}_{nd}\, r_n\, w_d
        Shapes   x_ND, branch_ND, w_D -> y_ND, rstd_N
        Dtypes   float
        Source   [spec 2 pre-norm] x + f(x), then [spec 2 RMSNorm]
        Cost     4 N*D multiply-adds; 4 N*D numbers. The backward is the norm's, onto the gradient that
                 the sum receives elsewhere.
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
        r"""Return dx_ND; add to dw_D.

        Equation z_{nd} = x_{nd}\, r_n \\
                 \mathrm{d}z_{nd} = \mathrm{d}y_{nd}\, w_d \\
                 \mathrm{d}x_{nd} = r_n \left( \mathrm{d}z_{nd} - z_{nd} \cdot \frac{1}{D} \sum_{d'}
                   \mathrm{d}z_{nd'}\, z_{nd'} \right) \\
                 \mathrm{d}w_d \leftarrow \mathrm{d}w_d + \sum_n \mathrm{d}y_{nd}\, z_{nd}
        Shapes   dy_ND, x_ND, w_D, rstd_N, dw_D, onto_ND? -> dx_ND
        Dtypes   float
        Source   [spec 2 RMSNorm]
        Cost     6 N*D multiply-adds; 3 N*D numbers.
        """

    # ---- attention ---------------------------------------------------------------------------

    def rotate_in_place(
        self, x_BTAC: FloatArray, cos_YJ: FloatArray, sin_YJ: FloatArray, first_1: IntArray | None
    ) -> None:
        r"""Turn each pair (x[j], x[j + C/2]) by its angle: rotary positions in HF's rotate-half form.

        The T rows of x have the angles of positions first .. first+T-1; None: from 0 on. The backward
        of a rotation is the rotation by the opposite angle: the same operation with -sin.

        Equation x_{btaj} \leftarrow x_{btaj} \cos \varphi_{tj} - x_{b,t,a,\,j + C/2} \sin \varphi_{tj}
                   \\
                 x_{b,t,a,\,j + C/2} \leftarrow x_{b,t,a,\,j + C/2} \cos \varphi_{tj} + x_{btaj} \sin
                   \varphi_{tj} \\
                 \varphi_{tj} = (\mathrm{first} + t) \cdot \mathrm{theta}^{-2j/C}
        Shapes   x_BTAC, cos_YJ, sin_YJ, first_1?
        Dtypes   float; int64 first_1
        Views    x_BTAC
        Source   [spec 2 RoPE], [RoPE eq. 34]
        Cost     2 B*T*A*C multiply-adds; 2 B*T*A*C numbers; the backward the same.
        """

    def attention(
        self, q_BTAC: FloatArray, k_BSGC: FloatArray, v_BSGC: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        r"""Causal softmax(q k^T / sqrt(C)) v; return out_BTAC and the rows' log-sum-exp_BAT.

        The T queries are the last T of the S positions: query t sees keys 0 .. S-T+t. Attention head
        a reads key/value head a // (A/G).

        Equation z_{bats} = \frac{1}{\sqrt{C}} \sum_c q_{btac}\, k_{bsgc} \\
                 g = \left\lfloor \frac{a}{A/G} \right\rfloor \\
                 \ell_{bat} = \log \sum_{s \le S - T + t} \exp z_{bats} \\
                 \mathrm{out}_{btac} = \sum_{s \le S - T + t} \exp( z_{bats} - \ell_{bat} )\, v_{bsgc}
        Shapes   q_BTAC, k_BSGC, v_BSGC -> out_BTAC, log_sum_exp_BAT
        Dtypes   float
        Views    q_BTAC, k_BSGC, v_BSGC
        Source   [spec 2 attention], [Attention eq. 1]
        Cost     2 B*A*C multiply-adds for each query and key seen: B*A*C*T*(T+1) when S = T;
                 B*C*(2 T*A + 2 S*G) numbers.
        """

    def attention_with_cache(
        self,
        q_BTAC: FloatArray,
        k_BTGC: FloatArray,
        v_BTGC: FloatArray,
        kv_BS2GC: FloatArray,
        filled_1: IntArray,
    ) -> FloatArray:
        r"""Put k and v behind the positions that kv holds, attend over all of them; return out_BTAC.

        kv holds the keys and values of positions 0 .. filled-1, keys in its first G heads. Those of
        positions filled .. filled+T-1 are overwritten by k and v; then the result is `attention`'s of
        q over the first filled+T positions.

        Equation \mathrm{kv}_{b,\, f + t,\, g} \leftarrow k_{btg} \\
                 \mathrm{kv}_{b,\, f + t,\, G + g} \leftarrow v_{btg} \\
                 f = \mathrm{filled} \\
                 \mathrm{out} = \mathrm{attention}(q, K, V) \\
                 K_{bsg} = \mathrm{kv}_{bsg} \\
                 V_{bsg} = \mathrm{kv}_{b,s,\,G + g} \\
                 S = f + T
        Shapes   q_BTAC, k_BTGC, v_BTGC, kv_BS2GC, filled_1 -> out_BTAC
        Dtypes   float; int64 filled_1
        Views    q_BTAC, k_BTGC, v_BTGC
        Source   [spec 2 attention], [Attention eq. 1]
        Cost     `attention`'s, and 4 B*T*G*C numbers. No backward: training has no cache.
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
        r"""Write (not add) the gradients into dq, dk and dv; here S = T.

        Equation p_{bats} = \exp( z_{bats} - \ell_{bat} ) \text{ where } s \le t, \text{ else } 0 \\
                 \mathrm{d}z_{bats} = p_{bats} \left( \sum_c \mathrm{d}\mathrm{out}_{btac}\, v_{bsgc} -
                   \sum_c \mathrm{d}\mathrm{out}_{btac}\, \mathrm{out}_{btac} \right) \\
                 \mathrm{d}q_{btac} = \frac{1}{\sqrt{C}} \sum_s \mathrm{d}z_{bats}\, k_{bsgc} \\
                 \mathrm{d}k_{bsgc} = \frac{1}{\sqrt{C}} \sum_{a :\, g(a) = g} \sum_t
                   \mathrm{d}z_{bats}\, q_{btac} \\
                 \mathrm{d}v_{bsgc} = \sum_{a :\, g(a) = g} \sum_t p_{bats}\,
                   \mathrm{d}\mathrm{out}_{btac}
        Shapes   dout_BTAC, q_BTAC, k_BTGC, v_BTGC, out_BTAC, log_sum_exp_BAT,
                 dq_BTAC, dk_BTGC, dv_BTGC
        Dtypes   float
        Views    q_BTAC, k_BTGC, v_BTGC, dq_BTAC, dk_BTGC, dv_BTGC
        Source   [spec 2 attention]; the probabilities are computed again, as in [FlashAttention]
        Cost     5/2 of the forward's multiply-adds; B*T*C*(4 A + 4 G) numbers.
        """

    # ---- feed-forward ------------------------------------------------------------------------

    def gated_activation(self, gate_up_N2F: FloatArray, *, activation: Activation) -> FloatArray:
        r"""h = act(gate) * up, gate being the first F columns and up the last F.

        silu(z) = z * sigmoid(z), relu2(z) = max(z, 0)^2.

        Equation h_{nf} = \mathrm{act}(\mathrm{gate}_{nf}) \cdot \mathrm{up}_{nf} \\
                 \mathrm{silu}(z) = z\, \sigma(z) \\
                 \sigma(z) = \frac{1}{1 + e^{-z}} \\
                 \mathrm{relu2}(z) = \max(z, 0)^2
        Shapes   gate_up_N2F -> h_NF
        Dtypes   float
        Source   [spec 2 FFN], [GLU eq. 5]
        Cost     N*F exponentials, 3 N*F multiplications; 3 N*F numbers.
        """

    def gated_activation_backward(
        self, dh_NF: FloatArray, gate_up_N2F: FloatArray, *, activation: Activation
    ) -> FloatArray:
        r"""Return dgate_up_N2F.

        Equation \mathrm{d}\mathrm{gate}_{nf} = \mathrm{d}h_{nf} \cdot \mathrm{up}_{nf} \cdot
                   \mathrm{act}'(\mathrm{gate}_{nf}) \\
                 \mathrm{d}\mathrm{up}_{nf} = \mathrm{d}h_{nf} \cdot \mathrm{act}(\mathrm{gate}_{nf}) \\
                 \mathrm{silu}'(z) = \sigma(z) \left( 1 + z \left( 1 - \sigma(z) \right) \right) \\
                 \mathrm{relu2}'(z) = 2 \max(z, 0)
        Shapes   dh_NF, gate_up_N2F -> dgate_up_N2F
        Dtypes   float
        Source   [spec 2 FFN]
        Cost     N*F exponentials, 7 N*F multiplications; 5 N*F numbers.
        """

    # ---- routing and experts -----------------------------------------------------------------

    def route(self, logits_ME: FloatArray, *, top_k: int, normalise: bool) -> Routing:
        r"""Softmax over all experts, the K largest, ties to the lower index, gates as in the spec.

        gate = p of the chosen, divided by their sum where `normalise`. A row with a NaN chooses the
        experts 0 .. K-1; its p and gates are NaN.

        Equation p_{me} = \frac{\exp l_{me}}{\sum_{e'} \exp l_{me'}} \\
                 \mathrm{lse}_m = \log \sum_e \exp l_{me} \\
                 I_{m1}, \ldots, I_{mK} = \text{the } K \text{ experts of the largest } p_{me}, \text{
                   of equal ones the lower} \\
                 g_{mk} = p_{m, I_{mk}} \\
                 \text{normalised: } g_{mk} = \frac{p_{m, I_{mk}}}{\sum_{k'} p_{m, I_{mk'}}}
        Shapes   logits_ME -> p_ME, log_sum_exp_M, expert_MK, gate_MK
        Dtypes   float; int64 expert_MK
        Source   [spec 3 softmax], [P2 eq. 5]; [spec 3 K largest]; renormalised gates [D1]
        Cost     M*E exponentials, M*E*K comparisons; 2 M*E + 3 M*K numbers.
        """

    def route_backward(
        self,
        dgate_MK: FloatArray,
        routing: Routing,
        counted_M: BoolArray,
        losses: RouterLosses,
        *,
        normalise: bool,
    ) -> FloatArray:
        r"""Return dlogits_ME: what the gates receive, and what balance loss and z-loss add.

        aux = E * sum_e f_e * mean_s p[s, e] with f_e = count_e / choices a constant, hence every
        counted sub-token's p receives daux * E * f_e / sub_tokens; z = mean_s lse_s^2, hence its
        log-sum-exp receives dz * 2 * lse / sub_tokens. The choice itself carries no gradient.

        Equation \mathrm{d}c_{mk} = \mathrm{d}g_{mk} \\
                 \text{normalised: } \mathrm{d}c_{mk} = \frac{\mathrm{d}g_{mk} - \sum_{k'}
                   \mathrm{d}g_{mk'}\, g_{mk'}}{\sum_{k'} p_{m, I_{mk'}}} \\
                 f_e = \frac{\mathrm{count}_e}{\mathrm{choices}} \\
                 \mathrm{d}p_{me} = \sum_{k :\, I_{mk} = e} \mathrm{d}c_{mk} + [m \text{ counted}]
                   \cdot \mathrm{daux} \cdot \frac{E f_e}{n_c} \\
                 \mathrm{d}\mathrm{lse}_m = [m \text{ counted}] \cdot \mathrm{dz} \cdot
                   \frac{2\, \mathrm{lse}_m}{n_c} \\
                 \mathrm{d}l_{me} = p_{me} \left( \mathrm{d}p_{me} - \sum_{e'} \mathrm{d}p_{me'}\,
                   p_{me'} \right) + \mathrm{d}\mathrm{lse}_m\, p_{me} \\
                 n_c = \mathrm{sub\_tokens}
        Shapes   dgate_MK, routing, counted_M, losses -> dlogits_ME
        Dtypes   float; int64 expert_MK; bool counted_M; float64 count_E
        Source   [spec 3 softmax]; balance loss [spec 4 aux], [Switch eq. 4]; z-loss [spec 4 z-loss],
                 [ST-MoE eq. 5]
        Cost     4 M*E + 6 M*K multiply-adds; 2 M*E + 4 M*K numbers: the backward of top-k gating is
                 that of a softmax, the K chosen entries having one summand more.
        """

    def add_router_statistics(
        self, routing: Routing, dispatch: Dispatch, counted_M: BoolArray, sums: RouterSums
    ) -> None:
        r"""Add to `sums` what the counted sub-tokens chose.

        Equation \mathrm{first}_e \leftarrow \mathrm{first}_e + \#\{ m \text{ counted} :\,
                   I_{m1} = e \} \\
                 \mathrm{choice}_e \leftarrow \mathrm{choice}_e + \#\{ (m, k) :\, m \text{ counted},\
                   I_{mk} = e \} \\
                 \mathrm{dropped}_e \leftarrow \mathrm{dropped}_e + \#\{ (m, k) :\, m \text{ counted},\
                   I_{mk} = e,\ \mathrm{slot}_{mk} = -1 \} \\
                 P_e \leftarrow P_e + \sum_{m \text{ counted}} p_{me} \\
                 Z \leftarrow Z + \sum_{m \text{ counted}} \mathrm{lse}_m^2
        Shapes   routing, dispatch, counted_M, sums
        Dtypes   float; int64 expert_MK, route_R, slot_MK, start_Z; bool counted_M;
                 float64 first_choice_E, choice_E, p_E, dropped_E, squared_log_sum_exp_1
        Source   [spec 4 aux], [spec 4 z-loss]
        Cost     M*E + M additions; M*E + 2 M*K numbers. No gradient of its own.
        """

    def dispatch(self, expert_MK: IntArray, *, experts: int, capacity: int | None) -> Dispatch:
        r"""Sort the choices by expert; keep at most `capacity` of each expert's (None: all).

        An expert's rows are in filling order: all first choices in sub-token order, then all second
        ones.

        Equation \mathrm{rank}_{mk} = \#\{ (m', k') :\, I_{m'k'} = I_{mk},\ (k', m') < (k, m) \} \\
                 \mathrm{start}_{e+1} - \mathrm{start}_e = \min\left( \#\{ (m, k) :\, I_{mk} = e \},\
                   \mathrm{capacity} \right) \\
                 \mathrm{slot}_{mk} = \mathrm{start}_{I_{mk}} + \mathrm{rank}_{mk} \text{ where }
                   \mathrm{rank}_{mk} < \mathrm{capacity}, \text{ else } -1
        Shapes   expert_MK -> route_R, slot_MK, start_Z
        Dtypes   int64 expert_MK, route_R, slot_MK, start_Z
        Source   [spec 4 capacity]
        Cost     no multiply-adds, a counting sort; 4 M*K + E numbers. No gradient: integers.
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
        r"""y[s] = sum_j gate[s, j] * Expert_{I[s, j]}(x[s]); dropped choices add nothing.

        Expert(x) = down(norm(act(gate(x)) * up(x))), the norm only where sub_norm_EF is given.

        Equation y_m = \sum_{k \text{ not dropped}} g_{mk}\, \mathrm{Expert}_{I_{mk}}(x_m) \\
                 \mathrm{Expert}_e(x) = W^{\mathrm{down}}_e\, \mathrm{norm}_e\left( \mathrm{act}(
                   W^{\mathrm{gate}}_e x ) \odot W^{\mathrm{up}}_e x \right)
        Shapes   x_MU, gate_MK, dispatch, gate_up_E2FU, down_EUF, sub_norm_EF?
                 -> y_MU, gate_up_R2F, rstd_R?
        Dtypes   float; int64 route_R, slot_MK, start_Z
        Source   [spec 3 Expert], [P1 eq. 3], with one head [P1 eq. 1]; Expert is [P1 eq. 5] in the
                 form of [GLU eq. 6]
        Cost     3 R*U*F + R*U multiply-adds; 3 E*U*F + 2 R*U + 5 R*F + M*U numbers.
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
        r"""Return dx_MU and dgate_MK (0 where dropped); add to the three weight gradients.

        Equation h_{mk} = \mathrm{act}(a_{mk}) \odot u_{mk} \\
                 a_{mk} = W^{\mathrm{gate}}_e x_m \\
                 u_{mk} = W^{\mathrm{up}}_e x_m \\
                 e = I_{mk} \\
                 \mathrm{d}g_{mk} = \left( (W^{\mathrm{down}}_e)^{\top} \mathrm{d}y_m \right) \cdot
                   \mathrm{norm}_e(h_{mk}) \\
                 \mathrm{d}W^{\mathrm{down}}_e \leftarrow \mathrm{d}W^{\mathrm{down}}_e + \sum_{mk :\,
                   I_{mk} = e} g_{mk}\, \mathrm{d}y_m\, \mathrm{norm}_e(h_{mk})^{\top} \\
                 \mathrm{d}h_{mk} = \mathrm{norm}_e'\left( g_{mk}\, (W^{\mathrm{down}}_e)^{\top}
                   \mathrm{d}y_m \right) \\
                 \mathrm{d}a_{mk} = \mathrm{d}h_{mk} \odot u_{mk} \odot \mathrm{act}'(a_{mk}) \\
                 \mathrm{d}u_{mk} = \mathrm{d}h_{mk} \odot \mathrm{act}(a_{mk}) \\
                 \mathrm{d}W^{\mathrm{gate}}_e \leftarrow \mathrm{d}W^{\mathrm{gate}}_e + \sum_{mk :\,
                   I_{mk} = e} \mathrm{d}a_{mk}\, x_m^{\top} \\
                 \mathrm{d}W^{\mathrm{up}}_e \leftarrow \mathrm{d}W^{\mathrm{up}}_e + \sum_{mk :\,
                   I_{mk} = e} \mathrm{d}u_{mk}\, x_m^{\top} \\
                 \mathrm{d}x_m = \sum_k \left( (W^{\mathrm{gate}}_{I_{mk}})^{\top} \mathrm{d}a_{mk} +
                   (W^{\mathrm{up}}_{I_{mk}})^{\top} \mathrm{d}u_{mk} \right)
        Shapes   dy_MU, x_MU, gate_MK, dispatch, gate_up_E2FU, down_EUF, sub_norm_EF?, cache,
                 dgate_up_E2FU, ddown_EUF, dsub_norm_EF? -> dx_MU, dgate_MK
        Dtypes   float; int64 route_R, slot_MK, start_Z
        Raises   TypeError: the weights are packed.
        Source   [spec 3 Expert], [P1 eq. 3]; quantised [spec 5 straight-through]
        Cost     6 R*U*F + 2 R*F multiply-adds; 9 E*U*F + 4 R*U + 10 R*F numbers.
        """

    # ---- loss --------------------------------------------------------------------------------

    def token_nll(self, x_ND: FloatArray, w_VD: FloatArray, target_N: IntArray) -> FloatArray:
        r"""nll[n] = logsumexp(logits[n]) - logits[n, target[n]], logits = x @ w.T; 0 where target < 0.

        Equation l_{nv} = \sum_d x_{nd}\, w_{vd} \\
                 \mathrm{nll}_n = \log \sum_v \exp l_{nv} - l_{n,\, t(n)} \text{ where } t(n) \ge 0,
                   \text{ else } 0
        Shapes   x_ND, w_VD, target_N -> nll_N
        Dtypes   float; int64 target_N
        Source   [spec 4 NLL]
        Cost     N*D*V multiply-adds, N*V exponentials; N*D + V*D numbers, and the logits, which need
                 not all be held at once.
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
        r"""`token_nll` and its backward in one pass: return nll_N and dx_ND, add to dw_VD.

        Every counted token's NLL has the same upstream gradient `dnll` (1 / number of targets for a
        mean), known beforehand; so the [N, V] logits need never be kept for a second pass.

        Equation \mathrm{d}l_{nv} = \mathrm{dnll} \cdot \left( \frac{\exp l_{nv}}{\sum_{v'} \exp
                   l_{nv'}} - [v = t(n)] \right) \text{ where } t(n) \ge 0, \text{ else } 0 \\
                 \mathrm{d}x_{nd} = \sum_v \mathrm{d}l_{nv}\, w_{vd} \\
                 \mathrm{d}w_{vd} \leftarrow \mathrm{d}w_{vd} + \sum_n \mathrm{d}l_{nv}\, x_{nd}
        Shapes   x_ND, w_VD, target_N, dw_VD -> nll_N, dx_ND
        Dtypes   float; int64 target_N
        Source   [spec 4 NLL]
        Cost     3 N*D*V multiply-adds, N*V exponentials; 2 N*D + 3 V*D numbers, and the logits.
        """

    # ---- optimiser ---------------------------------------------------------------------------

    def add_sum_of_squares(self, x_P: FloatArray, total_1: FloatArray) -> None:
        r"""total += the sum of x^2, added up in float64, in an order that depends on P alone.

        Equation \mathrm{total} \leftarrow \mathrm{total} + \sum_p x_p^2
        Shapes   x_P, total_1
        Dtypes   float; float64 total_1
        Source   [spec 6 clip]
        Cost     P multiply-adds; P numbers. No gradient.
        """

    def adamw_in_place(
        self,
        parameter_P: FloatArray,
        gradient_P: FloatArray,
        first_moment_P: FloatArray,
        second_moment_P: FloatArray,
        squares_1: FloatArray,
        guard: FloatArray,
        left_out_1: FloatArray,
        update_8: FloatArray,
    ) -> None:
        r"""One AdamW update with decoupled decay, of the clipped gradient, which is zero afterwards.

        update is what `AdamWSettings.update` says; squares is the gradient's sum of squares.
        g = gradient * min(1, clip_norm / sqrt(squares)); m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
        p = p - lr * (decay * p + (m / (1-b1^step)) / (sqrt(v / (1-b2^step)) + epsilon)).
        Where any number of `guard`, of any shape, is not finite, nothing is changed at all: a step that
        went wrong is found out on the host only later. Where one element's new p, m or v would not be
        finite, this element of all four stays as it is, its gradient too, and left_out counts it.

        Equation \hat g = g \cdot \min\left( 1,\ \frac{\mathrm{clip}}{\sqrt{\mathrm{squares}}} \right)
                   \\
                 m \leftarrow \beta_1 m + (1 - \beta_1)\, \hat g \\
                 v \leftarrow \beta_2 v + (1 - \beta_2)\, \hat g^2 \\
                 p \leftarrow p - \eta \left( \lambda p + \frac{m / (1 -
                   \beta_1^{\mathrm{step}})}{\sqrt{v / (1 - \beta_2^{\mathrm{step}})} + \varepsilon}
                   \right) \\
                 g \leftarrow 0
        Shapes   parameter_P, gradient_P, first_moment_P, second_moment_P, squares_1, guard, left_out_1,
                 update_8
        Dtypes   float; float64 squares_1, guard, left_out_1, update_8
        Source   [spec 6 AdamW], [AdamW algorithm 2]
        Cost     12 P multiply-adds, P roots; 8 P numbers. No gradient.
        """
