"""AdamW's two running means, laid out like the parameters."""

from __future__ import annotations

from typing import NamedTuple, Self

from numpy.typing import DTypeLike

from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray


class Moments(NamedTuple):
    """AdamW's running means, laid out like the parameters."""

    first: Parameters
    second: Parameters

    @classmethod
    def zeros(cls, config: ModelConfig, dtype: DTypeLike) -> Self:
        """Those of a model that has not learnt yet, on the host."""
        return cls(Parameters(config, dtype), Parameters(config, dtype))

    def to_device(self, ops: Operations) -> Self:
        """The host's as the backend's: these themselves, or copies."""
        return self._replace(first=self.first.to_device(ops), second=self.second.to_device(ops))

    def to_host(self, ops: Operations) -> Self:
        """The backend's as the host's: these themselves, or copies."""
        return self._replace(first=self.first.to_host(ops), second=self.second.to_host(ops))

    def tensors(self) -> dict[str, FloatArray]:
        """Both means under the tensors' names with a prefix.

        Shapes   -> those of spec 1
        """
        return {
            f"{prefix}.{name}": tensor
            for prefix, moment in (("first_moment", self.first), ("second_moment", self.second))
            for name, tensor in moment.tensors.items()
        }
