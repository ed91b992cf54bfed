"""The door at which a trace is written: every tensor under its name, in the order of computation.

What is written at once needs no memory of its own for what is not asked for, and the computation can
end with the last tensor that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.audit.computation_order import in_order
from mhmoe_np.audit.operands import Call, operands_of
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import LAYERS, Entry, Parameters, parameter_table
from mhmoe_np.model.weights import EMBEDDING, FINAL_NORM
from mhmoe_np.operations.door import Door, Promise
from mhmoe_np.operations.table import Operations

Tensors = dict[str, NDArray[Any]]


class Wanted(NamedTuple):
    """Which tensors of a trace are written, and where it ends."""

    only: Sequence[str] = ()  # patterns as of file names; none: all
    stop_at: str | None = None  # the last one; None: there is none
    operations: bool = False  # operands and results of each operation, too

    def keeps(self, name: str) -> bool:
        """Whether this tensor is written."""
        return not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)


class Reached(Exception):
    """The last tensor that was asked for has been computed."""


class Recorder(Door):
    """Operations whose arrays are written down under the names of the specification."""

    def __init__(
        self,
        ops: Operations,
        model: Model,
        gradient: Parameters | None,
        wanted: Wanted,
        *,
        sequences: int,
    ) -> None:
        super().__init__(ops)
        self._model, self._sequences, self._wanted = model, sequences, wanted
        self._table = entries = {entry.name: entry for entry in parameter_table(model.config)}
        arrays = model.weights.arrays
        self._weights = {id(arrays[name]): entry for name, entry in entries.items()}
        self._gradients: dict[int, Entry] = {}
        if gradient is not None:
            self._gradients = {id(gradient.arrays[name]): entry for name, entry in entries.items()}
        self.tensors: Tensors = {}
        self.seen: set[str] = set()
        self._layer = ""  # "layers.3"
        self._is_on_the_way_back = False

    def visit(self, operation: str, promise: Promise) -> _Call:
        """See `Door.visit`."""
        return _Call(self, operation)

    def write(self, name: str, array: Any, shape: tuple[int, ...] | None = None) -> None:
        """One tensor, the backend's or the host's: a copy, if it is asked for.

        Raises Reached: it is the last one.
        """
        self.seen.add(name)
        if self._wanted.keeps(name):
            host = np.array(array if isinstance(array, np.ndarray) else self._ops.to_host(array))
            self.tensors[name] = host if shape is None else host.reshape(shape)
        if name == self._wanted.stop_at:
            raise Reached

    def after(self, operation: str, arguments: Mapping[str, Any], results: Sequence[Any]) -> None:
        """What a call says of the trace's tensors."""
        of = next((self._weights[id(w)] for w in arguments.values() if id(w) in self._weights), None)
        name = "" if of is None else of.name
        if operation == "rms_norm" and name.endswith((".input_layernorm.weight", FINAL_NORM)):
            self._write_hidden(name, arguments["x_ND"])
        if name.startswith(LAYERS):
            self._layer = layer_of(name)
        if self._wanted.operations and not self._is_on_the_way_back:
            call = Call(operation, arguments, results, of, self._layer)
            for tensor, array in operands_of(call, self._table, self._model.config, ops=self._ops):
                self.write(tensor, array)
        if operation == "token_nll_and_gradient":
            self._is_on_the_way_back = True
        if operation == "linear" and name.endswith(".mlp.gate.weight"):
            self.write(f"{self._layer}.router_logits", results[0])
        if operation == "route":
            self.write(f"{self._layer}.experts", results[2])
        if operation == "rms_norm" and name == FINAL_NORM:
            logits_NV = self._ops.linear(results[0], self._model.weights.output_VD, None)
            self.write("logits", logits_NV, (self._sequences, -1, self._model.config.vocab_size))
        self._write_gradients(operation, arguments)

    def _write_gradients(self, operation: str, arguments: Mapping[str, Any]) -> None:
        """Those of the weights that a backward adds to."""
        found: Tensors = {}
        for value in arguments.values():
            entry = self._gradients.get(id(value))
            # A tied embedding's gradient begins at the output head and is whole at the other end.
            if entry is not None and (entry.name != EMBEDDING or operation == "embedding_backward"):
                whole = self._ops.to_host(value)
                found |= {f"grad.{part.tensor}": whole[part.where] for part in entry.parts}
        for name in in_order(found):
            self.write(name, found[name])

    def _write_hidden(self, norm: str, x_ND: Any) -> None:
        """The output of the layer before a norm; before the first one there is none."""
        L = self._model.config.num_hidden_layers
        number = L if norm == FINAL_NORM else int(norm.removeprefix(LAYERS).partition(".")[0])
        if number > 0:
            shape = (self._sequences, -1, self._model.config.hidden_size)
            self.write(f"layers.{number - 1}.hidden", x_ND, shape)


class _Call:
    """One call of one operation."""

    def __init__(self, recorder: Recorder, operation: str) -> None:
        self._recorder, self._operation = recorder, operation
        self._arguments: Mapping[str, Any] = {}

    def enter(self, arguments: Mapping[str, Any]) -> None:
        """Before it."""
        self._arguments = arguments

    def leave(self, results: Sequence[Any]) -> None:
        """After it."""
        self._recorder.after(self._operation, self._arguments, results)


def layer_of(name: str) -> str:
    """`model.layers.3.mlp.gate.weight` -> `layers.3`."""
    return ".".join(name.split(".")[1:3])
