"""Products with packed weights (`packed.cu`): exact sums of integers, scaled to floats.

Which kernel multiplies depends on sizes that the host knows, never on data; all give the same bits.
"""

from __future__ import annotations

from typing import Any

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.pack import Pack
from mhmoe_np.operations.cuda.quantise import ByteRows, Quantise
from mhmoe_np.operations.packing import FORMATS, PackedMatrices, code_shape
from mhmoe_np.operations.table import BitWeight, PackedWeight
from mhmoe_np.types import FloatArray, IntArray

INT8_TENSOR_CORES = 80  # the compute capability from which there are ours
FEW_ROWS = 8  # that one block of `product_of_rows` takes
FEW_THREADS = 128
PANEL = 16
FEW = 32  # up to so many rows, weights are read once for every FEW_ROWS of them
FEW_OF_EXPERT = 4  # rows that an expert has on average
ENOUGH_BLOCKS = 132  # one for each multiprocessor of an H100
GROUPS_OF_STEP = 4
KERNELS = Kernels("packed")


class PackedProducts(Quantise, Pack):
    """What the operations that take quantised weights share."""

    compute_capability: int

    def bit_linear(self, x_NI: FloatArray, w: BitWeight | PackedWeight) -> FloatArray:
        """y = (q @ w^T) * (beta * gamma/127) of one matrix, see `numpy_ref.linear`."""
        weight = self.as_packed(w)
        q = self._bytes_for(x_NI, weight.w)
        N, O = len(x_NI), weight.w.outputs
        y_NO: FloatArray = self.empty((N, O), x_NI.dtype)
        if N == 1:
            kernel, rows, outputs, threads = "product_of_row", 1, PANEL, FEW_THREADS
        elif N <= FEW or not self._has_tensor_cores:
            kernel, rows, outputs, threads = "product_of_rows", FEW_ROWS, PANEL, FEW_THREADS
        elif blocks(N, 128) * blocks(O, 128) < ENOUGH_BLOCKS:
            kernel, rows, outputs, threads = "product_of_small_tiles", 32, 64, 128
        else:
            kernel, rows, outputs, threads = "product_of_tiles", 128, 128, 256
        grid = blocks(N, rows), blocks(O, outputs)
        KERNELS.launch(kernel, x_NI.dtype, grid, (threads,), *_operands(weight, q), N, y_NO)
        return y_NO

    def grouped_bit_linear(
        self,
        x_RI: FloatArray,
        start_Z: IntArray,
        w: BitWeight | PackedWeight,
        *,
        rows: int,
        source_R: IntArray | None = None,
    ) -> FloatArray:
        """The same for a stack of matrices: rows start_Z[e] .. start_Z[e+1]-1 are those of matrix e.

        rows: a bound of start_Z[E], of which y has as many; those from start_Z[E] on are not written.
        source_R: which row of x is row r, so that x has any number of them (then each is quantised
            once, however often it is taken); -1: none, and y is 0 there.
        """
        weight = self.as_packed(w)
        q = self._bytes_for(x_RI, weight.w)
        E, O, _ = weight.shape
        y_RO: FloatArray = self.empty((rows, O), x_RI.dtype)
        if rows <= FEW or rows <= FEW_OF_EXPERT * E or not self._has_tensor_cores:
            kernel, tile, outputs, threads = "grouped_product_of_rows", FEW_ROWS, PANEL, FEW_THREADS
        elif rows < 96 * E or blocks(rows, 128) * blocks(O, 128) < ENOUGH_BLOCKS:
            kernel, tile, outputs, threads = "grouped_product_of_small_tiles", 32, 64, 128
        else:
            kernel, tile, outputs, threads = "grouped_product_of_tiles", 128, 128, 256
        # Each expert that has rows has one tile at most that is not full.
        grid = rows // tile + min(E, rows), blocks(O, outputs)
        experts = start_Z, E, start_Z if source_R is None else source_R, int(source_R is not None)
        KERNELS.launch(kernel, x_RI.dtype, grid, (threads,), *_operands(weight, q), *experts, y_RO)
        return y_RO

    def as_packed(self, w: BitWeight | PackedWeight) -> PackedWeight:
        """The packed form, a single matrix as a stack of one; packed here where there is none yet."""
        if isinstance(w, PackedWeight):
            return w
        *_, O, I = w.shape
        beta_EO = w.beta.reshape(-1, O)
        if w.packed is not None:
            return PackedWeight(w.packed, beta_EO)
        E = len(beta_EO)
        code = self.empty((E, *code_shape(O, I, "ternary-2bit")), "uint8")
        packed = PackedMatrices(code, O, I, "ternary-2bit")  # which holds signs as well
        self.pack_in_place(w.w.reshape(E, O, I), packed)
        return PackedWeight(packed, beta_EO)

    @property
    def _has_tensor_cores(self) -> bool:
        return self.compute_capability >= INT8_TENSOR_CORES

    def _bytes_for(self, x_NI: FloatArray, packed: PackedMatrices) -> ByteRows:
        """The rows in bytes, padded to what a step of the tensor cores takes."""
        step = GROUPS_OF_STEP * FORMATS[packed.format].group
        return self.quantise_to_bytes(x_NI, blocks(packed.inputs, step) * step)


def _operands(weight: PackedWeight, q: ByteRows) -> tuple[Any, ...]:
    """The arguments that all kernels begin with."""
    _, panels, groups, _ = weight.w.code.shape
    sizes = panels, groups, weight.w.outputs, FORMATS[weight.w.format].depth
    return weight.w.code, weight.beta, *sizes, q.q_NI, q.scale_N, q.sum_N, q.width
