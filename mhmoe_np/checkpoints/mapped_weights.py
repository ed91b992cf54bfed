"""Float weights that are used where they lie: in the pages of a checkpoint's file.

Little is copied, and what several processes use is in memory once [D26].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike

from mhmoe_np.model.parameters import parameter_table
from mhmoe_np.model.weights import Weights
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.tensors import check_finite, fill, map_tensors
from mhmoe_np.types import FloatArray


def load_mapped_weights(
    path: Path, config: ModelConfig, dtype: DTypeLike, on_progress: OnProgress = unseen
) -> Weights:
    """The weights of a model that is not quantised, on the host, every tensor accounted for.

    Arrays whose tensors follow one another in the file are views of it, those of gate and up say; the
    others are copies, as those of q, k and v, which files have in the order of their names.

    on_progress: counts bytes.

    Raises UserError: the file is missing, damaged, not finite, or does not fit the configuration.
    """
    table = parameter_table(config)
    number = np.zeros((), dtype)
    shapes = {entry.name: np.broadcast_to(number, entry.shape) for entry in table}  # of no size
    found = map_tensors(
        path, {part.tensor: shapes[entry.name][part.where] for entry in table for part in entry.parts}
    )
    arrays: dict[str, FloatArray] = {}
    copies: dict[str, FloatArray] = {}
    for entry in table:
        parts = [found[part.tensor] for part in entry.parts]
        if _adjoin(parts, number.dtype):
            arrays[entry.name] = _joined(parts[0], entry.shape)
        else:
            array = arrays[entry.name] = np.empty(entry.shape, dtype)
            copies |= {part.tensor: array[part.where] for part in entry.parts}
    tensors = found | copies
    size = sum(tensor.nbytes for tensor in tensors.values())
    read = counting(on_progress, f"reading {path.name}", size)
    fill(copies, found, read)
    # The copies and not what they are copies of: a number of float64 may be none of float32.
    check_finite(path, copies)
    check_finite(path, {name: found[name] for name in found if name not in copies}, read)
    return Weights(config, arrays)


def _adjoin(tensors: Sequence[FloatArray], dtype: np.dtype[np.floating]) -> bool:
    """Whether they are of this type, and each begins, aligned, where the one before it ends."""
    ends = [tensor.ctypes.data + tensor.nbytes for tensor in tensors]
    starts = [tensor.ctypes.data for tensor in tensors]
    return starts[1:] == ends[:-1] and all(
        tensor.dtype == dtype and tensor.flags.aligned for tensor in tensors
    )


def _joined(first: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """The array that begins with `first` and whose other parts follow it."""
    return as_strided(first.reshape(-1), (math.prod(shape),)).reshape(shape)
