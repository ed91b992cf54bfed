"""A model on its way in: what was translated of it, and that every tensor is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from tokenizers import Tokenizer

from mhmoe_np.errors import UserError
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.storage.tensors import check_finite


class Foreign(NamedTuple):
    """A model of another implementation, in our terms: what a checkpoint directory is written from."""

    parameters: Parameters  # float32, with the configuration
    tokenizer: Tokenizer | None
    end_of_text: tuple[int, ...]  # the ids that end a text; empty: the source does not say


class SourceTensor(NamedTuple):
    """A tensor of the source that has not been read yet."""

    name: str  # in the source, for messages
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]  # float32 or float64, of that shape


def fill(
    parameters: Parameters,
    found: Mapping[str, SourceTensor],
    *,
    source: Path,
    on_progress: OnProgress = unseen,
) -> None:
    """Fill every tensor of a model from the tensor of its name.

    found: by our names (spec 1). on_progress: counts parameters.

    Raises UserError: a tensor is missing, left over, of another shape or not finite. Names and shapes
    are checked before anything is read.
    """
    targets = parameters.tensors
    missing = [name for name in targets if name not in found]
    if missing:
        raise UserError(f"{source}: lacks the tensor that {missing[0]!r} comes from")
    unused = [tensor.name for name, tensor in found.items() if name not in targets]
    if unused:
        raise UserError(f"{source}: has tensor {unused[0]!r}, which its configuration does not need")
    for name, target in targets.items():
        if found[name].shape != target.shape:
            raise UserError(
                f"{source}: tensor {found[name].name!r} has shape {list(found[name].shape)}, "
                f"its configuration says {list(target.shape)}"
            )
    filled = counting(on_progress, "importing", parameters.count)
    for name, target in targets.items():
        target[...] = found[name].read()
        check_finite(source, {found[name].name: target})
        filled(target.size)
