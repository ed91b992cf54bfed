"""Finding numbers that are not finite in arrays, and the tensors of a model that hold them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.types import FloatArray


class Spot(NamedTuple):
    """The first number of an array that is not finite."""

    place: tuple[int, ...]
    value: float
    not_finite: int  # how many numbers of the array are not
    size: int  # of how many

    @property
    def share(self) -> str:
        """How many numbers of the array are not finite, in words."""
        return f"{self.not_finite} of {self.size} values not finite"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no such number."""
        return self._asdict() | {"value": str(self.value)}


class TensorFault(NamedTuple):
    """A tensor that holds numbers which are not finite."""

    what: str  # what the tensor is: "weight", "gradient", ...
    tensor: str
    spot: Spot

    def __str__(self) -> str:
        """One line."""
        spot = self.spot
        return f"{self.what} {self.tensor}{list(spot.place)} = {spot.value} ({spot.share})"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"what": self.what, "tensor": self.tensor, **self.spot.as_dict()}


def largest_magnitude(array: FloatArray) -> float:
    """Of all numbers of a host's array, 0 without any; not finite where one of them is not."""
    if not array.size:
        return 0.0
    # Twice through it, but nothing of its size is allocated; a NaN wins both times.
    return max(-float(array.min()), float(array.max()))


def spot_in(array: FloatArray) -> Spot | None:
    """Where a host's array is not finite."""
    if np.isfinite(largest_magnitude(array)):
        return None
    bad = ~np.isfinite(array)
    place = tuple(int(index) for index in np.unravel_index(bad.argmax(), bad.shape))
    return Spot(place, float(array[place]), int(np.count_nonzero(bad)), array.size)


def weights_fault(parameters: Parameters, what: str) -> TensorFault | None:
    """The first tensor that is not finite, in the parameter table's order, if any is.

    parameters: the host's; weights, a gradient or a moment.
    what: which of these, for the sentence.
    """
    if np.isfinite(largest_magnitude(parameters.flat_P)):
        return None
    for name, tensor in parameters.tensors.items():
        spot = spot_in(tensor)
        if spot is not None:
            return TensorFault(what, name, spot)
    return None


def state_faults(parameters: Parameters, moments: Moments) -> list[TensorFault]:
    """The first tensor of the weights, and of each moment, that is not finite; all are the host's."""
    groups = {
        "weight": parameters,
        "first moment of": moments.first,
        "second moment of": moments.second,
    }
    faults = (weights_fault(group, what) for what, group in groups.items())
    return [fault for fault in faults if fault is not None]
