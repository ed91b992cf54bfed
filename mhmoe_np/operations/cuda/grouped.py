"""Grouped GEMMs: rows sorted by expert times each expert's own matrix; `grouped.cu` has the kernels.

`start_Z` and the rows' routes stay on the device: a grid is sized by the bound on the rows, one launch
for all experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.driver import TENSOR_CORES_COMPUTE_CAPABILITY
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.types import FloatArray, IntArray

THREADS = 256
TILES = {"float32": 128, "float64": 64}  # rows and columns of a tile
FEW = 32  # rows of a tile where experts have few
SPREAD = 264  # blocks that keep a large device busy: two for each of an H100's processors
ROWS_OF_PART = 256  # of a weight gradient's, on average, at least
KERNELS = Kernels("grouped")


class Grouped(Memory):
    """Products of rows with the matrix of their expert.

    Where `route_R` is given, row r of the factor is the sub-token's of choice route_R[r]. The number of
    rows is a bound: those from start_Z[E] on are nobody's.
    """

    def grouped_gate_up(
        self,
        x_MU: FloatArray,
        route_R: IntArray,
        choices: int,
        start_Z: IntArray,
        w_E2FU: FloatArray,
        *,
        silu: bool,
        gate_up_R2F: FloatArray,
        h_RF: FloatArray,
    ) -> None:
        """Write gate(x) beside up(x), and h = act(gate) * up; 0 in nobody's rows."""
        (R, F), (E, _, U) = h_RF.shape, w_E2FU.shape
        kernel, rows, tile = self._kind("gate_up", x_MU.dtype, R, E)
        KERNELS.launch(
            kernel,
            x_MU.dtype,
            ((blocks(R, rows) + E + 1) * blocks(F, tile // 2),),
            (THREADS,),
            *(x_MU, route_R, choices, start_Z, w_E2FU, E, R, U, F, silu),
            *(_wide(x_MU, w_E2FU, gate_up_R2F, h_RF), gate_up_R2F, h_RF),
        )

    def grouped_linear(self, x_RI: FloatArray, start_Z: IntArray, w_EOI: FloatArray) -> FloatArray:
        """y[r] = x[r] @ w[e].T; nobody's rows are undefined."""
        (R, I), (E, O, _) = x_RI.shape, w_EOI.shape
        y_RO: FloatArray = self.empty((R, O), x_RI.dtype)
        kernel, rows, tile = self._kind("linear", x_RI.dtype, R, E)
        KERNELS.launch(
            kernel,
            x_RI.dtype,
            ((blocks(R, rows) + E) * blocks(O, tile),),
            (THREADS,),
            *(x_RI, start_Z, w_EOI, E, R, I, O, _wide(x_RI, w_EOI, y_RO), y_RO),
        )
        return y_RO

    def grouped_linear_backward(
        self, dy: FloatArray, route_R: IntArray, choices: int, start_Z: IntArray, w_EOI: FloatArray
    ) -> FloatArray:
        """dx[r] = dy[r] @ w[e]; nobody's rows are undefined.

        choices: K where dy is by sub-tokens, 0 where it is by rows.
        """
        R, (E, O, I) = len(route_R), w_EOI.shape
        dx_RI: FloatArray = self.empty((R, I), dy.dtype)
        kernel, rows, tile = self._kind("linear_backward", dy.dtype, R, E)
        KERNELS.launch(
            kernel,
            dy.dtype,
            ((blocks(R, rows) + E) * blocks(I, tile),),
            (THREADS,),
            *(dy, route_R, choices, start_Z, w_EOI, E, R, O, I, _wide(dy, w_EOI, dx_RI), dx_RI),
        )
        return dx_RI

    def grouped_weight_gradient(
        self,
        dy: FloatArray,
        dy_choices: int,
        x: FloatArray,
        x_choices: int,
        route_R: IntArray,
        start_Z: IntArray,
        dw_EOI: FloatArray,
    ) -> None:
        """dw[e] += dy[rows of e].T @ x[rows of e].

        dy_choices, x_choices: K where the factor is by sub-tokens, 0 where it is by rows.
        """
        E, O, I = dw_EOI.shape
        tile = TILES[dy.dtype.name]
        tiles = E * blocks(O, tile) * blocks(I, tile)
        parts = max(1, min(SPREAD // tiles, len(route_R) // (E * ROWS_OF_PART)))
        with self.scope():
            to: FloatArray = dw_EOI if parts == 1 else self.empty((parts, *dw_EOI.shape), dy.dtype)
            KERNELS.launch(
                "weight_gradient" + self._suffix(dy.dtype),
                dy.dtype,
                (tiles * parts,),
                (THREADS,),
                *(dy, dy_choices, x, x_choices, route_R, start_Z, E, O, I, parts, _wide(dy, x, to), to),
            )
            if parts > 1:
                grid = (blocks(dw_EOI.size, THREADS),)
                arguments = (to, parts, np.int64(dw_EOI.size), dw_EOI)
                KERNELS.launch("add_parts", dy.dtype, grid, (THREADS,), *arguments)

    def _kind(self, kernel: str, dtype: Any, R: int, E: int) -> tuple[str, int, int]:
        """The kernel's name with its kind of product, and a tile's rows and columns."""
        tile, suffix = TILES[dtype.name], self._suffix(dtype)
        if not suffix and R <= E * FEW:
            return f"{kernel}_few", FEW, tile
        return kernel + suffix, tile, tile

    def _suffix(self, dtype: Any) -> str:
        possible = dtype == np.float32 and self.compute_capability >= TENSOR_CORES_COMPUTE_CAPABILITY
        return f"_{self.matmul}" if possible and self.matmul != "float32" else ""


def _wide(*arrays: Any) -> bool:
    """Whether the rows of all begin where 16 bytes may be moved at once."""
    return all((a.data.ptr | a.shape[-1] * a.itemsize) % 16 == 0 for a in arrays)
