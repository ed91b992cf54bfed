"""The definition of every operation, in plain NumPy, to be read beside the papers.

Never optimised: speed belongs in the other backends, and tests hold them to this one.
"""

from mhmoe_np.operations.numpy_ref.attention import (
    attention,
    attention_backward,
    attention_with_cache,
    rotate_in_place,
)
from mhmoe_np.operations.numpy_ref.dispatch import dispatch
from mhmoe_np.operations.numpy_ref.experts import expert_ffn, expert_ffn_backward
from mhmoe_np.operations.numpy_ref.feed_forward import gated_activation, gated_activation_backward
from mhmoe_np.operations.numpy_ref.linear import (
    embedding,
    embedding_backward,
    linear,
    linear_backward,
)
from mhmoe_np.operations.numpy_ref.loss import token_nll, token_nll_and_gradient
from mhmoe_np.operations.numpy_ref.memory import (
    blas,
    buffer_bytes,
    device,
    empty,
    empty_packed,
    joined_step,
    packed_to_device,
    packed_to_host,
    repeated,
    scope,
    to_device,
    to_host,
    zeros,
)
from mhmoe_np.operations.numpy_ref.norm import add_in_place_and_norm, rms_norm, rms_norm_backward
from mhmoe_np.operations.numpy_ref.optimiser import adamw_in_place, add_sum_of_squares
from mhmoe_np.operations.numpy_ref.quantise import pack_in_place, quantise_rows, quantise_weight
from mhmoe_np.operations.numpy_ref.router import add_router_statistics, route, route_backward
from mhmoe_np.operations.numpy_ref.sums import add_in_place, add_sum
from mhmoe_np.operations.table import BackendName

name: BackendName = "numpy"
prefers_packed = False

__all__ = [
    "adamw_in_place",
    "add_in_place",
    "add_in_place_and_norm",
    "add_router_statistics",
    "add_sum",
    "add_sum_of_squares",
    "attention",
    "attention_backward",
    "attention_with_cache",
    "blas",
    "buffer_bytes",
    "device",
    "dispatch",
    "embedding",
    "embedding_backward",
    "empty",
    "empty_packed",
    "expert_ffn",
    "expert_ffn_backward",
    "gated_activation",
    "gated_activation_backward",
    "joined_step",
    "linear",
    "linear_backward",
    "name",
    "pack_in_place",
    "packed_to_device",
    "packed_to_host",
    "prefers_packed",
    "quantise_rows",
    "quantise_weight",
    "repeated",
    "rms_norm",
    "rms_norm_backward",
    "rotate_in_place",
    "route",
    "route_backward",
    "scope",
    "to_device",
    "to_host",
    "token_nll",
    "token_nll_and_gradient",
    "zeros",
]
