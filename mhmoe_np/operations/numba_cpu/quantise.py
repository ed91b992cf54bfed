"""BitNet's activations: rows in 8 bits, and what a BitLinear's rows and weights act as.

Everything here rounds as the definition does, so the bits are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.arithmetic import bits_of, float_of
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import exact
from mhmoe_np.operations.numba_cpu.regions import (
    ELEMENT_MACS,
    ROWS_ELEMENTWISE,
    block,
    blocks,
    run,
    tasks_of,
)
from mhmoe_np.types import FloatArray


@exact
def largest_magnitude(x_I: Any) -> Any:
    """max |x|, or NaN if one is NaN. Read as integers, magnitudes keep their order and NaN is last."""
    highest = bits_of(x_I.dtype.type(0))
    for i in range(len(x_I)):
        highest = max(highest, bits_of(abs(x_I[i])))
    return float_of(highest)


@exact
def quantise_row(x_I: Any, q_I: Any) -> Any:
    """Fill q_I, of any dtype and x_I itself at will, and return gamma/127.

    |x * (127/gamma)| stays below 127.5 whatever the roundings: the definition's clip never acts. A row
    with a NaN has a scale of NaN, one with an infinity a scale of infinity: no product hides them.
    """
    real = x_I.dtype.type
    gamma = largest_magnitude(x_I)
    if gamma < real(1e-5):
        gamma = real(1e-5)
    inverse = real(127) / gamma
    for i in range(len(x_I)):
        q_I[i] = q_I.dtype.type(np.rint(x_I[i] * inverse))
    return gamma / real(127)


@exact
def quantise_block(x_NI: Any, q_NI: Any, scale_N: Any) -> None:
    """Quantise some rows; q_NI may be x_NI."""
    for n in range(x_NI.shape[0]):
        scale_N[n] = quantise_row(x_NI[n], q_NI[n])


@exact
def scale_block(y_NO: Any, scale_N: Any, beta_O: Any) -> None:
    """y = (y + 0) * (beta * gamma/127): sums of integers, whose zero has no sign, become outputs."""
    zero = y_NO.dtype.type(0)
    for n in range(y_NO.shape[0]):
        y_O, scale = y_NO[n], scale_N[n]
        for o in range(len(beta_O)):
            y_O[o] = (y_O[o] + zero) * (beta_O[o] * scale)


@exact
def act_as_quantised(x_NI: Any, x_hat_NI: Any) -> None:
    """x_hat = q * gamma/127, what a BitLinear's input acts as; x_hat may be x."""
    for n in range(x_NI.shape[0]):
        x_hat_I = x_hat_NI[n]
        scale = quantise_row(x_NI[n], x_hat_I)
        for i in range(len(x_hat_I)):
            x_hat_I[i] *= scale


@exact
def scale_rows(w_OI: Any, beta_O: Any, w_hat_OI: Any) -> None:
    """w_hat = beta * w: what a BitLinear's weight acts as."""
    for o in range(w_OI.shape[0]):
        beta = beta_O[o]
        for i in range(w_OI.shape[1]):
            w_hat_OI[o, i] = beta * w_OI[o, i]


@exact
def scale_columns(dy_NO: Any, beta_O: Any, dacc_NO: Any) -> None:
    """dacc = dy * beta, so that dx = dacc @ w with w the integers; dacc may be dy."""
    for n in range(dy_NO.shape[0]):
        for o in range(len(beta_O)):
            dacc_NO[n, o] = dy_NO[n, o] * beta_O[o]


class QuantisedRows(NamedTuple):
    """Rows to quantise, a block a task."""

    x_NI: Any
    q_NI: Any  # written
    scale_N: Any  # written: gamma/127


@tasks_of(QuantisedRows, exact)
def _quantise_rows(i: int, a: Any) -> None:
    rows = block(i, ROWS_ELEMENTWISE)
    quantise_block(a.x_NI[rows], a.q_NI[rows], a.scale_N[rows])


class QuantiseRows(Buffers):
    """See `Operations`: quantisation of activations."""

    def quantise_rows(self, x_NI: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See `Operations.quantise_rows`."""
        q_NI: FloatArray = self.empty(x_NI.shape, x_NI.dtype)
        scale_N: FloatArray = self.empty(x_NI.shape[:1], x_NI.dtype)
        tasks = blocks(len(x_NI), ROWS_ELEMENTWISE)
        run(QuantisedRows(x_NI, q_NI, scale_N), tasks, macs=x_NI.size * ELEMENT_MACS)
        return q_NI, scale_N
