"""The first number of a step that is not finite is found, and named by what made it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import pytest

from mhmoe_np.audit.first_fault import Fault, first_fault, repeat_step
from mhmoe_np.audit.models import BASE, KINDS, QUANTISED, parameters
from mhmoe_np.audit.not_finite import weights_fault
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.loss import Batch, loss_and_gradient
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.door import promises
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations, PackedWeight
from tests.operations.cases import packed_weight
from tests.operations.runs import TABLE
from tests.strict_backend import StrictArray, StrictOperations, strict_operations

MAKERS: dict[str, Callable[[], Operations]] = {
    "numpy": lambda: load_operations("numpy"),
    "numba": lambda: load_operations("numba"),
    "numba-kept": lambda: load_operations("numba", keep_buffers=True),
    "strict": lambda: strict_operations()[0],
    "strict-packed": lambda: strict_operations(prefers_packed=True)[0],
}
# Every token goes in, and through every expert.
WINDOWS = np.random.default_rng(71).permutation(102).reshape(6, 17) % BASE["vocab_size"]
WHOLE = [Batch.of(WINDOWS)]
HALVES = [Batch.of(WINDOWS[:3]), Batch.of(WINDOWS[3:])]
# Together these have every tensor that a model can have, as floats and quantised.
PLANTED = [
    "dense-relu2-sub-norm-untied",
    "mh2-bias",
    "mh3-shared-sub-norm",
    "dense-ternary",
    "mh3-sign-projections-bias",
]


class Ready(NamedTuple):
    """What `first_fault` is given beside a batch."""

    model: Model
    gradient: Parameters
    ops: Operations

    def fault(self, micro_batches: list[Batch]) -> Fault | None:
        found = first_fault(self.model, self.gradient, micro_batches, ops=self.ops)
        assert not self.gradient.to_host(self.ops).flat_P.any(), "the gradient is not left at 0"
        return found


def ready(on_host: Parameters, ops: Operations) -> Ready:
    device = on_host.to_device(ops)
    with np.errstate(all="ignore"):
        model = Model.of(device, ops=ops)
    gradient = device.zeros_like(ops=ops)
    gradient.flat_P[...] = math.nan  # whatever an earlier step left
    return Ready(model, gradient, ops)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((backend, np.float32) for backend in MAKERS), ("numpy", np.float64), ("numba", np.float64)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_model_has_none(kind: str, backend: str, dtype: Any) -> None:
    at = ready(parameters(kind, dtype), MAKERS[backend]())
    for micro_batches in (WHOLE, HALVES):
        assert at.fault(micro_batches) is None


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_finite_step_comes_to_what_it_came_to(backend: str) -> None:
    at = ready(parameters("mh2-z-loss", np.float32), MAKERS[backend]())
    found = repeat_step(*at[:2], HALVES, ops=at.ops)
    expected = loss_and_gradient(*at[:2], HALVES, ops=at.ops)
    assert found.result is not None
    assert found.result.losses == expected.losses
    assert found.result.gradient_norm > 0
    assert list(found.hidden) == ["embedding", "layer 0", "layer 1", "final norm", "output head"]


# ---- in a weight -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "numba", "strict"])
@pytest.mark.parametrize("kind", PLANTED)
def test_a_weight_is_named_with_its_layer(kind: str, backend: str) -> None:
    healthy, rng = parameters(kind, np.float32), np.random.default_rng(73)
    quantised = {part.tensor for entry in healthy.table if entry.quantised for part in entry.parts}
    for name, tensor in healthy.tensors.items():
        for bad in (math.nan,) if backend == "strict" else (math.nan, math.inf, -math.inf):
            place = tuple(map(int, np.unravel_index(rng.integers(tensor.size), tensor.shape)))
            kept, tensor[place] = tensor[place], bad
            state = weights_fault(healthy, "weight")
            fault = ready(healthy, MAKERS[backend]()).fault(WHOLE)
            tensor[place] = kept
            assert state is not None
            assert (state.tensor, state.spot.place) == (name, place)
            assert same(state.spot.value, bad)
            assert (
                str(state)
                == f"weight {name}{list(place)} = {bad} (1 of {tensor.size} values not finite)"
            )

            assert fault is not None
            assert fault.tensor == name
            assert fault.layer == (int(name.split(".")[2]) if ".layers." in name else None)
            assert not fault.backward
            if name in quantised:  # its matrix has no finite scale, nor perhaps integers
                assert fault.role in ("weight", "scale")
                continue
            assert (fault.role, fault.spot.place, fault.spot.not_finite) == ("weight", place, 1)
            assert same(fault.spot.value, bad)
            assert f": its weight {name}{list(place)} = {bad} (1 of {tensor.size} " in str(fault)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def test_a_packed_weights_scale_is_named() -> None:
    """A packed model has no way back, but its forward comes first."""
    ops = load_operations("numpy")
    at = ready(parameters("mh2-ternary", np.float32), ops)
    for entry in at.gradient.table:
        if not entry.quantised:
            continue
        weights = dict(at.model.weights.arrays)
        matrices, beta_EO = packed_weight(cast(Any, weights[entry.name]), "ternary-2bit")
        beta_EO, part = beta_EO.copy(), entry.parts[-1]
        beta_EO.reshape(entry.shape[:-1])[part.where] = math.nan
        weights[entry.name] = PackedWeight(matrices, beta_EO)
        model = at.model._replace(weights=type(at.model.weights)(at.model.config, weights))
        fault = at._replace(model=model).fault(WHOLE)
        assert fault is not None
        assert (fault.role, fault.tensor) == ("scale", part.tensor)
        assert f"scale of {part.tensor}[0] = nan" in str(fault)


# ---- in what an operation makes ------------------------------------------------------------------


class Spoilt:
    """Operations the n-th of whose calls of one name leaves one bad number in one array.

    array: the name of a result or of an argument that is changed in place.
    """

    def __init__(self, ops: Any, operation: str, array: str, nth: int, bad: float) -> None:
        self._ops, self._operation, self._array = ops, operation, array
        self._left, self._bad = nth, bad

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)
        if name != self._operation:
            return operation

        def call(*arguments: Any, **options: Any) -> Any:
            result = operation(*arguments, **options)
            if self._left == 0:
                self._spoil(arguments, result)
            self._left -= 1
            return result

        return call

    def _spoil(self, arguments: tuple[Any, ...], result: Any) -> None:
        promise = promises()[self._operation]
        arrays = dict(zip(promise.results, flat(result), strict=True)) if promise.results else {}
        for name, value in zip(promise.arguments, arguments, strict=False):
            arrays.setdefault(name, value)
            if isinstance(value, tuple):
                arrays |= {f"{name}.{field}": part for field, part in value._asdict().items()}  # type: ignore[attr-defined]
        array = arrays[self._array]
        host = array.hidden() if isinstance(array, StrictArray) else array
        host[tuple(size - 1 for size in host.shape)] = self._bad


def flat(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [
            inner for part in value for inner in (flat(part) if isinstance(part, tuple) else [part])
        ]
    return [value]


# In the order of the calls: operation, its place among the calls of its name in a step of the kind,
# the array, and the layer of it.
FORWARD_AND_BACK: list[tuple[str, str, int, str, int | None, str]] = [
    # kind, operation, call, array, layer, section
    ("mh2-bias", "embedding", 0, "x_ND", None, "embedding"),
    ("mh2-bias", "rms_norm", 1, "y_ND", 1, "layer 1"),
    ("mh2-bias", "rms_norm", 0, "rstd_N", 0, "layer 0"),
    ("mh2-bias", "rms_norm", 2, "y_ND", None, "final norm"),
    ("mh2-bias", "linear", 0, "y_NO", 0, "layer 0"),
    ("mh2-bias", "rotate_in_place", 1, "x_BTAC", 1, "layer 1"),
    ("mh2-bias", "rotate_in_place", 2, "x_BTAC", 1, "layer 1"),  # on the way back
    ("mh2-bias", "rotate_in_place", 3, "x_BTAC", 0, "layer 0"),
    ("mh2-bias", "attention", 1, "out_BTAC", 1, "layer 1"),
    ("mh2-bias", "attention", 0, "log_sum_exp_BAT", 0, "layer 0"),
    ("mh2-bias", "add_in_place_and_norm", 1, "branch_ND", 1, "layer 1"),
    ("mh2-bias", "add_in_place_and_norm", 0, "y_ND", 0, "layer 0"),
    ("mh2-bias", "route", 1, "p_ME", 1, "layer 1"),
    ("mh2-bias", "route", 0, "gate_MK", 0, "layer 0"),
    ("mh2-bias", "route", 0, "log_sum_exp_M", 0, "layer 0"),
    ("mh2-bias", "expert_ffn", 0, "y_MU", 0, "layer 0"),
    ("mh2-bias", "expert_ffn", 1, "gate_up_R2F", 1, "layer 1"),
    ("mh3-shared-sub-norm", "expert_ffn", 1, "rstd_R", 1, "layer 1"),
    ("mh2-bias", "add_in_place", 1, "onto_ND", 1, "layer 1"),
    ("mh2-bias", "add_router_statistics", 1, "sums.p_E", 1, "layer 1"),
    ("mh2-bias", "add_router_statistics", 0, "sums.squared_log_sum_exp_1", 0, "layer 0"),
    ("mh3-shared-sub-norm", "gated_activation", 1, "h_NF", 1, "layer 1"),
    ("mh2-bias", "token_nll_and_gradient", 0, "nll_N", None, "output head"),
    ("mh2-bias", "token_nll_and_gradient", 0, "dx_ND", None, "output head"),
    ("mh2-bias", "token_nll_and_gradient", 0, "dw_VD", None, "output head"),
    ("mh2-bias", "add_sum", 0, "total_1", None, "output head"),
    ("mh2-bias", "rms_norm_backward", 0, "dx_ND", None, "final norm"),
    ("mh2-bias", "rms_norm_backward", 0, "dw_D", None, "final norm"),
    ("mh2-bias", "rms_norm_backward", 1, "dw_D", 1, "layer 1"),
    ("mh2-bias", "rms_norm_backward", 4, "dx_ND", 0, "layer 0"),
    ("mh2-bias", "linear_backward", 0, "dx_NI", 1, "layer 1"),
    ("mh2-bias", "linear_backward", 0, "dw_OI", 1, "layer 1"),
    ("mh2-bias", "linear_backward", 0, "db_O", 1, "layer 1"),
    ("mh2-bias", "expert_ffn_backward", 0, "dx_MU", 1, "layer 1"),
    ("mh2-bias", "expert_ffn_backward", 1, "dgate_MK", 0, "layer 0"),
    ("mh2-bias", "expert_ffn_backward", 1, "dgate_up_E2FU", 0, "layer 0"),
    ("mh2-bias", "expert_ffn_backward", 0, "ddown_EUF", 1, "layer 1"),
    ("mh3-shared-sub-norm", "expert_ffn_backward", 0, "dsub_norm_EF", 1, "layer 1"),
    ("mh2-bias", "route_backward", 1, "dlogits_ME", 0, "layer 0"),
    ("mh3-shared-sub-norm", "gated_activation_backward", 0, "dgate_up_N2F", 1, "layer 1"),
    ("mh3-shared-sub-norm", "add_in_place", 4, "onto_ND", 1, "layer 1"),  # on the way back
    ("mh2-bias", "attention_backward", 1, "dq_BTAC", 0, "layer 0"),
    ("mh2-bias", "attention_backward", 0, "dk_BTGC", 1, "layer 1"),
    ("mh2-bias", "attention_backward", 0, "dv_BTGC", 1, "layer 1"),
    ("mh2-bias", "embedding_backward", 0, "dw_VD", None, "embedding"),
    ("mh2-bias", "add_sum_of_squares", 0, "total_1", None, "gradient norm"),
    ("mh2-ternary", "linear", 0, "y_NO", 0, "layer 0"),
    ("mh2-ternary", "expert_ffn", 0, "y_MU", 0, "layer 0"),
    ("mh2-ternary", "linear_backward", 0, "dw_OI", 1, "layer 1"),
]
INTEGERS = {"dispatch"}  # gives nothing that could be other than finite
ELSEWHERE = {  # of the table, but not of the forward and backward of a batch
    "attention_with_cache",
    "token_nll",
    "quantise_rows",
    "quantise_weight",
    "pack_in_place",
    "adamw_in_place",
}


def test_every_operation_of_a_step_is_spoilt() -> None:
    assert {row[1] for row in FORWARD_AND_BACK} == TABLE - INTEGERS - ELSEWHERE


@pytest.mark.parametrize("backend", MAKERS)
@pytest.mark.parametrize(
    ("kind", "operation", "nth", "array", "layer", "section"),
    FORWARD_AND_BACK,
    ids=lambda value: str(value),
)
def test_the_operation_that_made_it_is_named(
    kind: str,
    operation: str,
    nth: int,
    array: str,
    layer: int | None,
    section: str,
    backend: str,
) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        ops = cast(Operations, Spoilt(MAKERS[backend](), operation, array, nth, bad))
        fault = ready(parameters(kind, np.float32), ops).fault(WHOLE)
        assert fault is not None
        assert (fault.operation, fault.layer, fault.section) == (operation, layer, section)
        assert same(fault.spot.value, bad)
        assert fault.spot.not_finite == 1
        assert fault.micro_batch is None
        assert math.isfinite(fault.largest_input)
        assert "; its inputs are finite, up to " in str(fault)
        back = {("rotate_in_place", 2), ("rotate_in_place", 3), ("add_in_place", 4)}
        if operation.endswith("_backward") or (operation, nth) in back:
            assert fault.backward
        weights = {"dw_OI", "db_O", "dw_D", "dw_VD", "dgate_up_E2FU", "ddown_EUF", "dsub_norm_EF"}
        if array in weights:
            tensors = parameters(kind, np.float32).tensors
            assert fault.role == "gradient"
            assert f"gradient of {fault.tensor}[" in str(fault)
            # The last number of the array is the last of its last tensor.
            assert fault.spot.place == tuple(size - 1 for size in tensors[fault.tensor].shape)
        else:
            assert (fault.role, fault.tensor) == ("result", array)


def test_the_sentence_says_where_what_and_how_many() -> None:
    ops = cast(Operations, Spoilt(load_operations("numpy"), "linear_backward", "dw_OI", 3, math.inf))
    fault = ready(parameters("mh2-bias", np.float32), ops).fault(WHOLE)
    assert fault is not None
    head, _, largest = str(fault).rpartition(" ")
    assert head == (
        "layer 1, linear_backward of model.layers.1.self_attn.o_proj.weight: gradient of "
        "model.layers.1.self_attn.o_proj.weight[23, 23] = inf "
        "(1 of 576 values not finite; its inputs are finite, up to"
    )
    assert float(largest.rstrip(")")) == pytest.approx(fault.largest_input, rel=0.1)
    values = fault.as_dict()
    assert (values["value"], values["place"], values["size"]) == ("inf", (23, 23), 576)


def test_it_names_the_micro_batch() -> None:
    """With two a pass over both comes first, for the balance loss."""
    for call, micro_batch, section in ((0, 0, "layer 0"), (3, 1, "layer 1"), (7, 1, "layer 1")):
        spoilt = Spoilt(load_operations("numpy"), "route", "gate_MK", call, math.nan)
        fault = ready(parameters("mh2-bias", np.float32), cast(Operations, spoilt)).fault(HALVES)
        assert fault is not None
        assert (fault.micro_batch, fault.section) == (micro_batch, section)
        assert str(fault).startswith(f"micro-batch {micro_batch}, {section}, route: gate_MK[")


@pytest.mark.parametrize("backend", MAKERS)
def test_numbers_that_grow_beyond_float32_are_found_where_they_do(backend: str) -> None:
    at = parameters("dense", np.float32)
    at.tensors["model.layers.1.mlp.down_proj.weight"][...] = 1e38
    at.tensors["model.layers.1.mlp.gate_proj.weight"][...] *= 1e10
    fault = ready(at, MAKERS[backend]()).fault(WHOLE)
    assert fault is not None
    assert (fault.operation, fault.layer, fault.tensor) == ("linear", 1, "y_NO")
    assert fault.of == "model.layers.1.mlp.down_proj.weight"
    assert fault.largest_input == pytest.approx(1e38)


@pytest.mark.parametrize("kind", ["dense", *QUANTISED[:2]])
def test_a_state_without_such_numbers_has_no_fault(kind: str) -> None:
    assert weights_fault(parameters(kind, np.float32), "weight") is None


def test_the_strict_backend_keeps_its_own_arrays() -> None:
    """The door brings over copies; the model goes on with the device's arrays."""
    strict = StrictOperations()
    ready(parameters("dense", np.float32), cast(Operations, strict)).fault(WHOLE)
    assert strict.doors["to_host"] > 50
