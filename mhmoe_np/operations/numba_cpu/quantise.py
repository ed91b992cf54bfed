"""BitNet's quantisers; every function here rounds as the definition does, so the bits are the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from mhmoe_np.operations.numba_cpu.arithmetic import bits_of, float_of
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import ROWS_ELEMENTWISE, exact, parallel, reduction
from mhmoe_np.operations.packing import FORMATS, PANEL, PLACES, PackedMatrices
from mhmoe_np.operations.table import Quantization
from mhmoe_np.types import FloatArray

SERIAL_WEIGHTS = 1 << 15  # so many are quantised before a second thread has woken up


@exact
def _largest_magnitude(x_I: Any) -> Any:
    """max |x|, or NaN if one is NaN. Read as integers, magnitudes keep their order and NaN is last."""
    highest = bits_of(x_I.dtype.type(0))
    for i in range(len(x_I)):
        highest = max(highest, bits_of(abs(x_I[i])))
    return float_of(highest)


@exact
def quantise_row(x_I: Any, q_I: Any) -> Any:
    """Fill q_I, of any dtype and x_I itself at will, and return gamma/127.

    |x * (127/gamma)| stays below 127.5 whatever the roundings: the definition's clip never acts.
    """
    real = x_I.dtype.type
    gamma = _largest_magnitude(x_I)
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


@exact
def _sum(x_OI: Any, magnitudes: bool) -> Any:
    """The sum of x, or of |x|, as two floats of which the second is what rounding loses of the first.

    Each column keeps its sum in two floats, high + low; the error of an addition is recovered exactly
    (Knuth's two-sum).
    """
    outputs, inputs = x_OI.shape
    high_I, low_I = np.zeros(inputs), np.zeros(inputs)
    for o in range(outputs):
        x_I = x_OI[o]
        for i in range(inputs):
            x = np.float64(abs(x_I[i]) if magnitudes else x_I[i])
            high = high_I[i]
            total = high + x
            part = total - high
            low_I[i] += (high - (total - part)) + (x - part)
            high_I[i] = total
    total, rest = 0.0, 0.0
    for i in range(inputs):
        high = total
        total = high + high_I[i]
        part = total - high
        rest += (high - (total - part)) + (high_I[i] - part) + low_I[i]
    return total, rest


@exact
def _mean_is_certain(w_OI: Any, total: float, rest: float, lost: float) -> Any:
    """Whether the mean of w comes out the same wherever the sum lies within total + rest +- lost."""
    real = w_OI.dtype.type
    least, most = total + (rest - lost), total + (rest + lost)
    return real(least / w_OI.size) == real(most / w_OI.size)


@reduction
def _quick_sum(x_I: Any) -> float:
    """The sum of |x| in float64, in any order."""
    total = 0.0
    for i in range(len(x_I)):
        total += np.float64(abs(x_I[i]))
    return total


@exact
def _sums_of_matrix(w_OI: Any, ternary: bool, sums: Any) -> Any:
    """Leave sum |w| and, for sign weights, sum w; return whether the means are certain.

    In n additions a float64 loses less than n 2^-53 sum |w|, two floats n 2^-104 sum |w|. Where even
    that could decide the rounding of a mean, somebody must add exactly.
    """
    total, rest = 0.0, 0.0
    for o in range(w_OI.shape[0]):
        total += _quick_sum(w_OI[o])
    certain = _mean_is_certain(w_OI, total, rest, w_OI.size * 2.0**-52 * total)
    if not certain:
        total, rest = _sum(w_OI, True)
        lost = (w_OI.shape[0] + w_OI.shape[1]) * 2.0**-104 * total
        certain = _mean_is_certain(w_OI, total, rest, lost)
    sums[0] = total + rest
    if not ternary:
        lost = (w_OI.shape[0] + w_OI.shape[1]) * 2.0**-104 * total
        total, rest = _sum(w_OI, False)
        sums[1] = total + rest
        certain = certain and _mean_is_certain(w_OI, total, rest, lost)
    return certain


@exact
def _quantise_matrix(w_OI: Any, ternary: bool, sums: Any, q_OI: Any, beta_O: Any, count_4: Any) -> None:
    real = w_OI.dtype.type
    beta = real(sums[0] / w_OI.size)
    if beta < real(1e-5):  # NaN stays
        beta = real(1e-5)
    middle = real(0) if ternary else real(sums[1] / w_OI.size)
    inverse = real(1) / beta
    minus, plus, flipped = 0, 0, 0
    for o in range(w_OI.shape[0]):
        w_I, q_I = w_OI[o], q_OI[o]
        for i in range(len(w_I)):
            if ternary:
                q = min(max(np.rint(w_I[i] * inverse), real(-1)), real(1))
            else:
                q = real(1) if w_I[i] - middle > real(0) else real(-1)
            flipped += q != q_I[i]
            minus += q < real(0)
            plus += q > real(0)
            q_I[i] = q
        beta_O[o] = beta
    count_4[0], count_4[2], count_4[3] = minus, plus, flipped
    count_4[1] = w_OI.size - minus - plus


@exact
def _sum_task(x: int, w_OI: Any, start_Z: Any, ternary: bool, sums: Any, certain: Any) -> None:
    certain[x] = _sums_of_matrix(w_OI[start_Z[x] : start_Z[x + 1]], ternary, sums[x])


@exact
def _quantise_task(
    x: int,
    w_OI: Any,
    start_Z: Any,
    ternary: bool,
    sums: Any,
    q_OI: Any,
    beta_O: Any,
    counts: Any,
) -> None:
    o, z = start_Z[x], start_Z[x + 1]
    _quantise_matrix(w_OI[o:z], ternary, sums[x], q_OI[o:z], beta_O[o:z], counts[x])


@parallel
def _sum_all(w_OI: Any, start_Z: Any, ternary: bool, sums: Any, certain: Any) -> None:
    for x in prange(len(certain)):
        _sum_task(x, w_OI, start_Z, ternary, sums, certain)


@parallel
def _quantise_all(
    w_OI: Any, start_Z: Any, ternary: bool, sums: Any, q_OI: Any, beta_O: Any, counts: Any
) -> None:
    for x in prange(len(counts)):
        _quantise_task(x, w_OI, start_Z, ternary, sums, q_OI, beta_O, counts)


@exact
def _codes_of_group(q_I: Any, lowest: int, step: int, depth: int, bits: int, code_4: Any) -> None:
    """Four bytes of one output: the codes of a group's inputs; bits = 0: in base 3."""
    for place in range(PLACES):
        value = np.int32(0)
        for block in range(depth):
            i = block * PLACES + place
            code = np.int32(q_I[i] - lowest) >> (step - 1) if i < len(q_I) else np.int32(0)
            value = value | code << (bits * block) if bits > 0 else 3 * value + code
        code_4[place] = value if bits > 0 else (256 * value + 242) // 243


@exact
def _codes_of_ternary_group(q_I: Any, code_4: Any) -> None:
    """The same for a whole group of ternary-2bit, the format that training uses most."""
    for place in range(PLACES):
        value = np.int32(q_I[place]) + 1
        value |= (np.int32(q_I[place + 4]) + 1) << 2
        value |= (np.int32(q_I[place + 8]) + 1) << 4
        value |= (np.int32(q_I[place + 12]) + 1) << 6
        code_4[place] = value


@exact
def _pack_panel(q_OI: Any, lowest: int, step: int, depth: int, bits: int, code_GB: Any) -> None:
    """Codes of up to 16 outputs; outputs beyond the matrix have code 0."""
    group = depth * PLACES
    whole = q_OI.shape[1] // group if bits == 2 else 0
    for lane in range(PANEL):
        first, last = lane * PLACES, (lane + 1) * PLACES
        if lane >= len(q_OI):
            code_GB[:, first:last] = 0
            continue
        q_I = q_OI[lane]
        for g in range(whole):
            _codes_of_ternary_group(q_I[g * group :], code_GB[g, first:last])
        for g in range(whole, len(code_GB)):
            q_group = q_I[g * group : (g + 1) * group]
            _codes_of_group(q_group, lowest, step, depth, bits, code_GB[g, first:last])


@parallel
def _pack(q_EOI: Any, lowest: int, step: int, depth: int, bits: int, code: Any) -> None:
    panels = code.shape[1]
    for i in prange(code.shape[0] * panels):
        e, o = i // panels, i % panels * PANEL
        _pack_panel(q_EOI[e, o : o + PANEL], lowest, step, depth, bits, code[e, i % panels])


@parallel
def _quantise_blocks(x_NI: Any, q_NI: Any, scale_N: Any, rows: int) -> None:
    for block in prange((x_NI.shape[0] + rows - 1) // rows):
        n, z = block * rows, (block + 1) * rows
        quantise_block(x_NI[n:z], q_NI[n:z], scale_N[n:z])


class Quantise(Buffers):
    """See `Operations`: quantisation."""

    def quantise_rows(self, x_NI: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See `Operations.quantise_rows`."""
        q_NI: FloatArray = self.empty(x_NI.shape, x_NI.dtype)
        scale_N: FloatArray = self.empty(x_NI.shape[:1], x_NI.dtype)
        if len(x_NI) <= ROWS_ELEMENTWISE:
            quantise_block(x_NI, q_NI, scale_N)
        else:
            _quantise_blocks(x_NI, q_NI, scale_N, ROWS_ELEMENTWISE)
        return q_NI, scale_N

    def quantise_weight(
        self,
        w_OI: FloatArray,
        starts: tuple[int, ...],
        *,
        quantization: Quantization,
        q_OI: FloatArray,
        beta_O: FloatArray,
        report_X5: FloatArray,
    ) -> None:
        """See `Operations.quantise_weight`. A task for each matrix."""
        start_Z = np.array(starts)
        matrices, ternary = len(start_Z) - 1, quantization == "bitnet_b158"
        sums, certain = np.zeros((matrices, 2)), np.empty(matrices, np.bool_)
        counts = np.empty((matrices, 4), np.int64)
        to_sum = (w_OI, start_Z, ternary, sums, certain)
        to_quantise = (w_OI, start_Z, ternary, sums, q_OI, beta_O, counts)
        if w_OI.size <= SERIAL_WEIGHTS:
            for matrix in range(matrices):
                _sum_task(matrix, *to_sum)
        else:
            _sum_all(*to_sum)
        for x in np.flatnonzero(~certain):
            weights = w_OI[start_Z[x] : start_Z[x + 1]]
            finite = np.isfinite(weights).all()
            for i, terms in enumerate((np.abs(weights),) if ternary else (np.abs(weights), weights)):
                sums[x, i] = math.fsum(terms.ravel().tolist()) if finite else np.nan
        if w_OI.size <= SERIAL_WEIGHTS:
            for matrix in range(matrices):
                _quantise_task(matrix, *to_quantise)
        else:
            _quantise_all(*to_quantise)
        report_X5[:, 0] = beta_O[start_Z[:-1]]
        report_X5[:, 1:] = counts

    def pack_in_place(self, q_EOI: FloatArray, packed: PackedMatrices) -> None:
        """See `Operations.pack_in_place`. A task for each panel."""
        _, depth, base, lowest, step = FORMATS[packed.format]
        bits = 8 // depth if 2 ** (8 // depth) >= base else 0
        _pack(q_EOI, lowest, step, depth, bits, packed.code)
