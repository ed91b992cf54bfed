"""The experts, the paper's subject: `grouped.py` has their products, `experts.cu` what lies between.

Nothing is read back: rows from start_Z[E] on, up to the bound len(route_R), are nobody's, and every
kernel sees that by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.grouped import Grouped
from mhmoe_np.operations.cuda.packed import PackedProducts, on_device
from mhmoe_np.operations.table import Activation, BitWeight, Dispatch, ExpertCache, PackedWeight, Weight
from mhmoe_np.types import FloatArray, IntArray

THREADS = 256
ROWS = THREADS // 32  # of a block: a warp each
COLUMNS, LINES = 32, 16  # of a block that sums columns
KERNELS = Kernels("experts")


class Experts(Grouped, PackedProducts):
    """See `Operations`: the experts."""

    def expert_ffn(
        self,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        gate_up_E2FU: Weight,
        down_EUF: Weight,
        sub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
        eps: float,
    ) -> tuple[FloatArray, ExpertCache]:
        """See `Operations.expert_ffn`."""
        gate_up_E2FU, down_EUF = on_device(gate_up_E2FU), on_device(down_EUF)
        route_R, slot_MK, start_Z = dispatch
        R, (E, F2, U), (M, K), dtype = len(route_R), gate_up_E2FU.shape, gate_MK.shape, x_MU.dtype
        F, silu = F2 // 2, activation == "silu"
        y_MU: FloatArray = self.empty(x_MU.shape, dtype)
        rstd_R: FloatArray | None = None if sub_norm_EF is None else self.empty((R,), dtype)
        if isinstance(gate_up_E2FU, BitWeight | PackedWeight):
            gate_up_R2F = self._bit_gate_up(x_MU, route_R, K, start_Z, gate_up_E2FU)
        else:
            gate_up_R2F = self.empty((R, F2), dtype)
        with self.scope():
            n_RF: FloatArray = self.empty((R, F), dtype)
            if isinstance(gate_up_E2FU, BitWeight | PackedWeight):
                self._activate(start_Z, gate_up_R2F, n_RF, silu=silu)
            else:
                factors = (x_MU, route_R, K, start_Z, gate_up_E2FU)
                self.grouped_gate_up(*factors, silu=silu, gate_up_R2F=gate_up_R2F, h_RF=n_RF)
            if sub_norm_EF is not None:
                arguments = (start_Z, E, R, F, sub_norm_EF, eps, n_RF, rstd_R)
                self._by_rows("norm_rows", R, dtype, *arguments)
            if isinstance(down_EUF, BitWeight | PackedWeight):
                y_RU = self.grouped_bit_linear(n_RF, start_Z, down_EUF, rows=R)
            else:
                y_RU = self.grouped_linear(n_RF, start_Z, down_EUF)
            self._by_rows("combine", M, dtype, y_RU, gate_MK, slot_MK, M, K, U, y_MU)
        return y_MU, ExpertCache(gate_up_R2F, rstd_R)

    def expert_ffn_backward(
        self,
        dy_MU: FloatArray,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        gate_up_E2FU: Weight,
        down_EUF: Weight,
        sub_norm_EF: FloatArray | None,
        cache: ExpertCache,
        dgate_up_E2FU: FloatArray,
        ddown_EUF: FloatArray,
        dsub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.expert_ffn_backward`.

        The derivation is that of `numpy_ref`: a = dy @ down, dgate = a . n, dn = gate a.
        """
        gate_up_E2FU, down_EUF = on_device(gate_up_E2FU), on_device(down_EUF)
        if isinstance(gate_up_E2FU, PackedWeight) or isinstance(down_EUF, PackedWeight):
            raise TypeError("packed weights have no gradient")
        route_R, slot_MK, start_Z = dispatch
        R, (E, U, F), (M, K), dtype = len(route_R), ddown_EUF.shape, gate_MK.shape, x_MU.dtype
        silu, normed, acting = (
            activation == "silu",
            sub_norm_EF is not None,
            isinstance(down_EUF, BitWeight),
        )
        gate_up_R2F, rstd_R = cache
        # What is absent needs some array in its place.
        norm = (gate_up_R2F, gate_up_R2F) if sub_norm_EF is None else (sub_norm_EF, rstd_R)
        dx_MU: FloatArray = self.empty(x_MU.shape, dtype)
        dgate_MK: FloatArray = self.empty(gate_MK.shape, dtype)
        with self.scope():
            n_RF: FloatArray = self.empty((R, F), dtype)
            if isinstance(down_EUF, BitWeight):
                self._activate(start_Z, gate_up_R2F, n_RF, silu=silu, norm=norm if normed else None)
                n_RF, down_EUF = self.straight_through(n_RF, down_EUF)
            a_RF = self.grouped_linear_backward(dy_MU, route_R, K, start_Z, down_EUF)
            dgate_up_R2F: FloatArray = self.empty((R, 2 * F), dtype)
            dgate_R: FloatArray = self.empty((R,), dtype)
            self._by_rows(
                *("rows_backward", R, dtype, start_Z, E, R, F, silu, normed, acting),
                *(route_R, gate_MK, *norm, gate_up_R2F, a_RF, n_RF, dgate_up_R2F, dgate_R),
            )
            self.grouped_weight_gradient(dy_MU, K, n_RF, 0, route_R, start_Z, ddown_EUF)
            if dsub_norm_EF is not None:
                grid, block = (E * blocks(F, COLUMNS),), (COLUMNS, LINES)
                KERNELS.launch("sub_norm_gradient", dtype, grid, block, a_RF, start_Z, F, dsub_norm_EF)
            if isinstance(gate_up_E2FU, BitWeight):
                x_MU, gate_up_E2FU = self.straight_through(x_MU, gate_up_E2FU)
            self.grouped_weight_gradient(dgate_up_R2F, 0, x_MU, K, route_R, start_Z, dgate_up_E2FU)
            dx_RU = self.grouped_linear_backward(dgate_up_R2F, route_R, 0, start_Z, gate_up_E2FU)
            arguments = (dx_RU, dgate_R, slot_MK, M, K, U, dx_MU, dgate_MK)
            self._by_rows("combine_backward", M, dtype, *arguments)
        return dx_MU, dgate_MK

    def _bit_gate_up(
        self,
        x_MU: FloatArray,
        route_R: IntArray,
        choices: int,
        start_Z: IntArray,
        w_E2FU: BitWeight | PackedWeight,
    ) -> FloatArray:
        """gate(x) beside up(x) of every row; nobody's are undefined."""
        R = len(route_R)
        sub_token_R: IntArray = self.empty((R,), np.int64)
        grid = (blocks(R, THREADS),)
        arguments = (route_R, choices, R, sub_token_R)
        KERNELS.launch("sub_tokens_of_rows", x_MU.dtype, grid, (THREADS,), *arguments)
        return self.grouped_bit_linear(x_MU, start_Z, w_E2FU, rows=R, source_R=sub_token_R)

    def _activate(
        self,
        start_Z: IntArray,
        gate_up_R2F: FloatArray,
        n_RF: FloatArray,
        *,
        silu: bool,
        norm: tuple[Any, Any] | None = None,
    ) -> None:
        """h = act(gate) * up of every row; or the norm's output again, by its weights and 1 / sqrt."""
        (R, F), E = n_RF.shape, len(start_Z) - 1
        weights = (gate_up_R2F, gate_up_R2F) if norm is None else norm
        arguments = (start_Z, E, R, F, silu, norm is not None, *weights, gate_up_R2F, n_RF)
        self._by_rows("activate_rows", R, n_RF.dtype, *arguments)

    def _by_rows(self, kernel: str, rows: int, dtype: Any, *arguments: Any) -> None:
        """Launch a kernel that has a warp for each row."""
        KERNELS.launch(kernel, dtype, (blocks(rows, ROWS),), (THREADS,), *arguments)
