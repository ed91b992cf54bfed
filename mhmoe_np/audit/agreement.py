"""Two computations of the same operation, compared: a fast backend, or a peer, with the definition."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.audit.calls import Call
from mhmoe_np.audit.host_facing import on_host
from mhmoe_np.operations.door import arrays_in, flat, promises
from mhmoe_np.operations.packing import PackedMatrices
from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray

# Of an array's largest number. Sums of up to some hundred terms in two orders are apart by a few
# roundings of their size, and a float32 `exp` is off by up to two and a half.
ROUNDINGS = 16

Arrays = dict[str, NDArray[Any]]


class Agreement(NamedTuple):
    """How far one call's results are from the definition's, and what that must stay below.

    A bound of 0 asks for the same bits.
    """

    operation: str
    form: str
    dtype: str
    max_rel_error: float
    bound: float
    same_bits: bool
    array: str  # that is farthest off

    @property
    def passed(self) -> bool:
        """Whether the results are within the bound."""
        return self.max_rel_error <= self.bound if self.bound else self.same_bits


def named_arguments(call: Call) -> dict[str, Any]:
    """The arguments and options of a call by their names in the table."""
    signature = inspect.signature(getattr(Operations, call.operation))
    bound = signature.bind(None, *call.arguments, **call.options).arguments
    del bound["self"]
    return bound


def labelled_arrays(arguments: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Label and array of every array in a call's arguments: `x_NI`, `routing.p_ME`, `packed.code`."""
    for name, value in arguments.items():
        if isinstance(value, PackedMatrices):
            yield f"{name}.code", value.code
        elif type(value) is not tuple:  # of plain numbers
            yield from ((label, array) for label, array, _ in arrays_in(name, value))


def results_of(call: Call, ops: Operations) -> Arrays:
    """What a call returns, and its arguments as they are afterwards: some operations change them."""
    arguments, options = copy.deepcopy((call.arguments, dict(call.options)))
    mine = call._replace(arguments=arguments, options=options)
    returned = getattr(on_host(ops), call.operation)(*arguments, **options)
    names = promises()[call.operation].results
    results = {
        name: array for name, array in zip(names, flat(returned), strict=True) if array is not None
    }
    return dict(labelled_arrays(named_arguments(mine))) | results


def agreement(call: Call, actual: Arrays, expected: Arrays, *, dtype: str) -> Agreement:
    """Compare what is in `actual` with what the definition gives, for operands of that float type."""
    worst, max_error, same = next(iter(actual)), 0.0, True
    for name, array in actual.items():
        rows = len(expected[name])
        if name == "route_R":  # on the GPU there is room for the most rows that there can be [D18]
            array = array[:rows]
        same &= array.tobytes() == expected[name].tobytes()
        error = _error(array, expected[name])
        if error > max_error:
            worst, max_error = name, error
    bound = 0.0 if call.exact else ROUNDINGS * float(np.finfo(dtype).eps)
    return Agreement(call.operation, call.form, dtype, max_error, bound, same, worst)


def _error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference over the largest number; integers must be equal. Infinite where not."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return math.inf
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(actual, expected) else math.inf
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return math.inf
    difference, size = _largest(actual - expected), _largest(expected)
    if size == 0:
        return math.inf if difference else 0.0
    return difference / size


def _largest(x: FloatArray) -> float:
    return float(np.abs(x).max(initial=0))
