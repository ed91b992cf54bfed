"""The first number of a training step that is not finite: which operation of which layer made it.

The step's forward and backward are repeated through a door at which the arrays that each operation was
given and returned are looked at, until one of them holds a NaN or an infinity. An infinity that a later
formula would take to a finite limit [D12] counts too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple, NoReturn, cast

import numpy as np

from mhmoe_np.audit.not_finite import Spot, largest_magnitude, spot_in
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.loss import Batch, DeviceBatch, add_loss_and_gradient, targets_of
from mhmoe_np.model.parameters import Entry, Parameters
from mhmoe_np.model.sums import StepResult, StepSums
from mhmoe_np.operations.door import Door, Promise, arrays_in
from mhmoe_np.operations.table import Operations, PackedWeight
from mhmoe_np.types import FloatArray

Role = Literal["weight", "scale", "argument", "gradient", "result"]
SECTIONS = {  # of operations outside the layers
    "embedding": "embedding",
    "embedding_backward": "embedding",
    "rms_norm": "final norm",
    "rms_norm_backward": "final norm",
    "token_nll_and_gradient": "output head",
    "add_sum_of_squares": "gradient norm",
}
HIDDEN = {"x_ND", "branch_ND", "onto_ND", "y_ND"}  # of the model's width, on the way there


class Fault(NamedTuple):
    """The first operation of a step that met or made a number that is not finite."""

    micro_batch: int | None  # from 0; None: the batch has a single one
    section: str  # "layer 3", "embedding", "final norm", "output head" or "gradient norm"
    layer: int | None  # None: outside the layers
    backward: bool
    operation: str
    of: str | None  # the weights it computes with, by the parameter table's names; None: without
    role: Role  # the first three were not finite before the operation, the others after it
    tensor: str  # a weight, its scale, its gradient: the tensor's name on disk; else the table's name
    spot: Spot  # in that tensor
    largest_input: float  # the largest magnitude of the operation's finite inputs

    def __str__(self) -> str:
        """One line."""
        where = self.section
        if self.micro_batch is not None:
            where = f"micro-batch {self.micro_batch}, {where}"
        operation = self.operation if self.of is None else f"{self.operation} of {self.of}"
        if self.backward and not self.operation.endswith("_backward"):
            operation += " on the way back"
        named = {
            "weight": "its weight ",
            "argument": "given ",
            "scale": "scale of ",
            "gradient": "gradient of ",
        }.get(self.role, "")
        inputs = ""
        if self.role in ("gradient", "result"):
            inputs = f"; its inputs are finite, up to {self.largest_input:.2g}"
        spot = self.spot
        return (
            f"{where}, {operation}: {named}{self.tensor}{list(spot.place)} = {spot.value} "
            f"({spot.share}{inputs})"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = self._asdict()
        return values | values.pop("spot").as_dict()


class Repetition(NamedTuple):
    """What came of a step that was repeated under observation."""

    fault: Fault | None
    result: StepResult | None  # None: there is a fault
    hidden: dict[str, float]  # section -> largest magnitude of its hidden states, up to the fault


class _Stopped(Exception):
    """Ends the repetition at its fault."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class _Named(NamedTuple):
    """What an array of the parameter table is."""

    entry: Entry
    layer: int | None
    gradient: bool


class _Observed(Door):
    """Operations whose arrays are all looked at."""

    def __init__(self, ops: Operations, model: Model, gradient: Parameters, micro_batches: int) -> None:
        super().__init__(ops)
        self._names = _names_of(model, gradient)
        self._micro_batches, self._embedded = micro_batches, 0
        self._section, self._backward = "", False
        self._layer: int | None = None
        self.hidden: dict[str, float] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """See `Operations.empty`: zeros, so that nothing is taken for a fault before it is written."""
        array = self._ops.empty(shape, dtype)
        array[...] = 0
        return array

    def visit(self, operation: str, promise: Promise) -> _Look:
        """See `Door.visit`."""
        return _Look(self, operation, promise)

    def known(self, value: Any) -> _Named | None:
        """What an argument is if it is a weight of the model or its gradient."""
        return self._names.get(id(value))

    def locate(self, operation: str, named: Sequence[_Named]) -> None:
        """Where in the step an operation stands: its weights say so, else those of the last before."""
        layers = [owner.layer for owner in named if owner.layer is not None]
        if layers:
            self._layer, self._section = layers[0], f"layer {layers[0]}"
        elif named or operation in SECTIONS:
            self._layer, self._section = None, SECTIONS[operation]
        if operation == "embedding":
            self._embedded, self._backward = self._embedded + 1, False
        elif operation.endswith("_backward"):
            self._backward = True

    def note(self, label: str, magnitude: float) -> None:
        """How large an array of the present section is, if it is a hidden state."""
        if label in HIDDEN and not self._backward:
            self.hidden[self._section] = max(self.hidden.get(self._section, 0.0), magnitude)

    def host(self, array: Any) -> FloatArray:
        """The backend's array as NumPy's."""
        return self._ops.to_host(array)

    def place(self) -> tuple[int | None, str, int | None, bool]:
        """Where in the step the operation stands: the first fields of a `Fault`."""
        several = self._micro_batches > 1
        micro_batch = (self._embedded - 1) % self._micro_batches if several else None
        return micro_batch, self._section, self._layer, self._backward


class _Look:
    """One call of one operation, whose arrays are looked at before and after it."""

    def __init__(self, door: _Observed, operation: str, promise: Promise) -> None:
        self._door, self._operation, self._promise = door, operation, promise
        self._arguments: Mapping[str, Any] = {}
        self._largest = 0.0
        self._of: str | None = None

    def enter(self, arguments: Mapping[str, Any]) -> None:
        """Before it: what is not finite here no operation has made."""
        self._arguments = arguments
        named = [owner for owner in map(self._door.known, arguments.values()) if owner is not None]
        self._door.locate(self._operation, named)
        if named:  # several weights, as an expert's, have the start of their names in common
            steps = zip(*(owner.entry.name.split(".") for owner in named), strict=False)
            self._of = ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))
        bad = None
        for label, value, host in self._floats(arguments):
            magnitude = largest_magnitude(host)
            if math.isfinite(magnitude):
                self._largest = max(self._largest, magnitude)
            else:
                bad = bad or (label, value, host)
        if bad is not None:
            self._stop(*bad, otherwise="argument")

    def leave(self, results: Sequence[Any]) -> None:
        """After it: its results, then what it changed in place."""
        returned = dict(zip(self._promise.results, results, strict=True))
        for values in (returned, self._arguments):
            for label, value, host in self._floats(values):
                magnitude = largest_magnitude(host)
                if not math.isfinite(magnitude):
                    self._stop(label, value, host, otherwise="result")
                self._door.note(label, magnitude)

    def _floats(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, FloatArray]]:
        """Label, argument or result, and the array on the host."""
        for name, value in values.items():
            for label, array, _ in arrays_in(name, value):
                if array.dtype.kind == "f":
                    yield label, value, self._door.host(array)

    def _stop(self, label: str, value: Any, host: FloatArray, *, otherwise: Role) -> NoReturn:
        """The fault is in this array; otherwise: its role where it is no weight and no gradient."""
        named = self._door.known(value)
        if named is None:
            role, parts = otherwise, [(label, host)]
        else:
            scale = isinstance(value, PackedWeight) or ".beta_" in label
            role = "gradient" if named.gradient else "scale" if scale else "weight"
            # A scale is there for every row, so that a part lies in it as in the weights.
            whole = host.reshape(named.entry.shape[:-1] if scale else named.entry.shape)
            parts = [(part.tensor, whole[part.where]) for part in named.entry.parts]
        tensor, spot = next(
            (tensor, spot) for tensor, part in parts if (spot := spot_in(part)) is not None
        )
        fault = Fault(*self._door.place(), self._operation, self._of, role, tensor, spot, self._largest)
        raise _Stopped(fault)


def _names_of(model: Model, gradient: Parameters) -> dict[int, _Named]:
    """Every weight and gradient by its identity: the model hands them to operations as they are."""
    names = {}
    for entry in gradient.table:
        _, _, rest = entry.name.partition("model.layers.")
        layer = int(rest.partition(".")[0]) if rest else None
        names[id(model.weights.arrays[entry.name])] = _Named(entry, layer, gradient=False)
        names[id(gradient.arrays[entry.name])] = _Named(entry, layer, gradient=True)
    return names


def repeat_step(
    model: Model, gradient: Parameters, micro_batches: Sequence[Batch], *, ops: Operations
) -> Repetition:
    """The forward and backward of a batch and its gradient's norm, up to what is not finite in them.

    gradient: of the backend, for use meanwhile; filled with 0 before and after.

    Raises ValueError: see `add_loss_and_gradient`.
    """
    door = _Observed(ops, model, gradient, len(micro_batches))
    observed = cast(Operations, door)
    sums = StepSums(model.config, ops=observed)
    gradient.flat_P[...] = 0
    try:
        # A number beyond the floats' range is what is looked for, not something to warn of.
        with np.errstate(all="ignore"):
            targets = targets_of(micro_batches)
            batches = [DeviceBatch.of(batch, model.config, ops=ops) for batch in micro_batches]
            add_loss_and_gradient(model, gradient, batches, sums, targets=targets, ops=observed)
            observed.add_sum_of_squares(gradient.flat_P, sums.squares_1)
    except _Stopped as stopped:
        return Repetition(stopped.fault, None, door.hidden)
    finally:
        gradient.flat_P[...] = 0
    result = sums.read(targets, model.weights.dtype)
    return Repetition(None, result, door.hidden)


def first_fault(
    model: Model, gradient: Parameters, micro_batches: Sequence[Batch], *, ops: Operations
) -> Fault | None:
    """The first number that is not finite when a batch goes through the model and back; None: none is.

    model, gradient: of the backend; the gradient is filled with 0 before and after.

    Raises ValueError: see `add_loss_and_gradient`.
    """
    return repeat_step(model, gradient, micro_batches, ops=ops).fault
