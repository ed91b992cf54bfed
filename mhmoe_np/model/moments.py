"""AdamW's two running means, laid out like the parameters."""

from __future__ import annotations

from typing import NamedTuple, Self

from numpy.typing import DTypeLike

from mhmoe_np.model.parameters import Parameters
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray


class Moments(NamedTuple):
    """AdamW's running means, laid out like the parameters."""

    first: Parameters
    second: Parameters

    @classmethod
    def zeros(cls, config: ModelConfig, dtype: DTypeLike) -> Self:
        """Those of a model that has not learnt yet."""
        return cls(Parameters(config, dtype), Parameters(config, dtype))

    def tensors(self) -> dict[str, FloatArray]:
        """Both means under the tensors' names with a prefix."""
        return {
            f"{prefix}.{name}": tensor
            for prefix, moment in (("first_moment", self.first), ("second_moment", self.second))
            for name, tensor in moment.tensors.items()
        }
