"""The dimension key and the array types: what every shape suffix in this package means.

An array's name ends in its axes, in memory order: `x_ND` is [tokens, model width]. The gradient of
`x_ND` is `dx_ND`. One name has one shape; a reshape gets a new name. A digit is an axis of that size,
but a 2 before a letter doubles it. tests/house checks that every suffix uses letters of this key alone
and, while models run, that the arrays have the shapes that their names say.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

DIMENSIONS = {
    "B": "sequences in the batch",
    "T": "positions being computed",
    "S": "positions attended to (= T in training), or that a key-value cache has room for",
    "Y": "positions that a model has room for",
    "N": "tokens, B*T",
    "D": "model width",
    "V": "vocabulary",
    "L": "layers",
    "A": "attention heads",
    "G": "key/value heads",
    "C": "width of one attention head",
    "F": "inner width of a feed-forward network or expert",
    "H": "MoE heads (the papers' h)",
    "M": "sub-tokens, N*H",
    "U": "sub-token width, D/H",
    "E": "experts",
    "K": "experts chosen per sub-token",
    "R": "routed rows, sorted by expert (M*K less the dropped)",
    "Z": "the E+1 boundaries of the experts' segments in R",
    "X": "matrices of BitLinears that are quantised together",
    "I": "input width of a linear map",
    "O": "output width of a linear map",
    "Q": "width of the joint query/key/value projection, (A + 2G)*C",
    "P": "all parameters of a model in one flat buffer",
    "J": "rotated pairs of an attention head, C/2",
    "W": "tokens of a stored stream",
    "2": "a doubled axis: gate then up (2F)",
}

FloatArray: TypeAlias = NDArray[np.floating[Any]]
IntArray: TypeAlias = NDArray[np.integer[Any]]
BoolArray: TypeAlias = NDArray[np.bool_]
