"""Products with packed weights (`packed.cu`): exact sums of integers, scaled to floats.

Which kernel multiplies depends on sizes that the host knows, never on data; all give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mhmoe_np.errors import UserError
from mhmoe_np.operations.bfloat16 import BFloat16Weight
from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.driver import TENSOR_CORES_COMPUTE_CAPABILITY
from mhmoe_np.operations.cuda.pack import Pack
from mhmoe_np.operations.cuda.quantise import ByteRows, Quantise
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.packing import FORMATS, PackedMatrices, code_shape
from mhmoe_np.operations.table import BitWeight, PackedWeight, Weight
from mhmoe_np.types import FloatArray, IntArray

FEW = 32  # up to so many rows the weights, unpacked anew for every 8, are what takes time
FEW_OF_EXPERT = 4  # the same, of each expert on average
MANY_OF_EXPERT = 96  # from so many on, tiles of 128 rows are full enough
ENOUGH_BLOCKS = 132  # one for each multiprocessor of an H100
GROUPS_OF_STEP = 4  # of inputs, in the kernels for tiles
KERNELS = Kernels("packed")


class Tiling(NamedTuple):
    """A kernel, how many results its blocks have, and their threads."""

    kernel: str
    rows: int
    outputs: int
    threads: int


ROW = Tiling("product_of_row", 1, 16, 128)
ROWS = Tiling("product_of_rows", 8, 16, 128)
SMALL_TILES = Tiling("product_of_small_tiles", 32, 64, 128)
TILES = Tiling("product_of_tiles", 128, 128, 256)


def tiling_for(rows: int, outputs: int, *, experts: int | None, tensor_cores: bool) -> Tiling:
    """The kernel that is expected to be fastest; experts: None for a single matrix."""
    if rows == 1 and experts is None:
        return ROW
    E = experts or 1
    if rows <= max(FEW, FEW_OF_EXPERT * E) or not tensor_cores:
        return ROWS
    if rows < MANY_OF_EXPERT * E or blocks(rows, 128) * blocks(outputs, 128) < ENOUGH_BLOCKS:
        return SMALL_TILES
    return TILES


def on_device(w: Weight) -> FloatArray | BitWeight | PackedWeight:
    """A weight of a kind that has kernels here.

    Raises UserError: it has not.
    """
    if isinstance(w, Int8Weight | BFloat16Weight):
        raise UserError(
            "--backend cuda: multiplies no int8 or bfloat16 weights; give --backend numba, or unpack "
            "the checkpoint and leave --head-dtype out"
        )
    return w


class PackedProducts(Quantise, Pack):
    """What the operations that take quantised weights share."""

    def bit_linear(self, x_NI: FloatArray, w: BitWeight | PackedWeight) -> FloatArray:
        """y = (q @ w^T) * (beta * gamma/127) of one matrix, see `numpy_ref.linear`."""
        weight = self.as_packed(w)
        return self.product_of_bytes(self.bytes_for(x_NI, weight.w), weight)

    def product_of_bytes(self, q: ByteRows, weight: PackedWeight) -> FloatArray:
        """The same of rows that are quantised already (`bytes_for`)."""
        N, O, real = len(q.q_NI), weight.w.outputs, q.scale_N.dtype
        y_NO: FloatArray = self.empty((N, O), real)
        tiling = tiling_for(N, O, experts=None, tensor_cores=self._has_tensor_cores)
        grid = blocks(N, tiling.rows), blocks(O, tiling.outputs)
        operands = *_operands(weight, q), N, y_NO
        KERNELS.launch(tiling.kernel, real, grid, (tiling.threads,), *operands)
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
        q = self.bytes_for(x_RI, weight.w)
        E, O, _ = weight.shape
        y_RO: FloatArray = self.empty((rows, O), x_RI.dtype)
        tiling = tiling_for(rows, O, experts=E, tensor_cores=self._has_tensor_cores)
        # Each expert that has rows has one tile at most that is not full.
        grid = rows // tiling.rows + min(E, rows), blocks(O, tiling.outputs)
        experts = start_Z, E, start_Z if source_R is None else source_R, int(source_R is not None)
        operands = *_operands(weight, q), *experts, y_RO
        KERNELS.launch(f"grouped_{tiling.kernel}", x_RI.dtype, grid, (tiling.threads,), *operands)
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
        q_EOI = w.w.reshape(E, O, I)
        self.pack_in_place(q_EOI, packed)
        return PackedWeight(packed, self.scale_of_rows(q_EOI, beta_EO))

    def bytes_for(self, x_NI: FloatArray, packed: PackedMatrices) -> ByteRows:
        """The rows in bytes, padded to what a step of the tensor cores takes."""
        step = GROUPS_OF_STEP * FORMATS[packed.format].group
        return self.quantise_to_bytes(x_NI, blocks(packed.inputs, step) * step)

    @property
    def _has_tensor_cores(self) -> bool:
        return self.compute_capability >= TENSOR_CORES_COMPUTE_CAPABILITY


def _operands(weight: PackedWeight, q: ByteRows) -> tuple[Any, ...]:
    """The arguments that all kernels begin with."""
    _, panels, groups, _ = weight.w.code.shape
    sizes = panels, groups, weight.w.outputs, FORMATS[weight.w.format].depth
    return weight.w.code, weight.beta, *sizes, q.q_NI, q.scale_N, q.sum_N, q.width
