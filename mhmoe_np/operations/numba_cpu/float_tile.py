"""The innermost loop of a float32 product, in LLVM's terms: a tile, whose sums stay in registers.

A tile is ROWS rows of the product against COLUMNS of its columns. At each input it loads the vectors of
the second factor, spreads one number of each row of the first over all lanes, and adds their products
to the sums. The second factor lies in a panel, COLUMNS numbers of each input side by side; the first
may lie as it likes. Every sum goes input by input: its bits do not depend on the tile or its place.

Arrays are given by the addresses of their first numbers, steps in bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mhmoe_np.operations.numba_cpu.compiling import literal_intrinsic, typed_intrinsic
from mhmoe_np.operations.numba_cpu.instruction_set import features
from mhmoe_np.operations.numba_cpu.vector_code import I8, I32, I64, VectorCode

# 12 vectors of sums of the 16 registers of AVX2, 24 of the 32 of AVX-512: with the two vectors of
# the panel and one spread number, as many as fit.
LANES, ROWS = (16, 12) if "avx512f" in features() else (8, 6)
VECTORS = 2
COLUMNS = VECTORS * LANES
NUMBER = 4  # bytes of a float32
PIECE = 4  # numbers of a row that are turned at once: shuffles are cheap within 128 bits
UNROLLED = 8  # inputs between two tests for the end
AS_THEY_LIE, COPIED = range(2)
"""How the rows of a tile are given."""

FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
FETCH_TO_WRITE, KEPT_CLOSE, DATA = (ir.Constant(I32, number) for number in (1, 3, 1))


def _int(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


class _Code(VectorCode):
    """Emits float32 code on raw addresses."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        super().__init__(builder, LANES)

    def pointer(self, address: ir.Value) -> ir.Value:
        return self.b.inttoptr(address, I8.as_pointer())

    def store(self, value: ir.Value, pointer: ir.Value, offset: ir.Value) -> None:
        """An unaligned store at a byte offset."""
        place = self.b.bitcast(self.b.gep(pointer, [offset]), value.type.as_pointer())
        self.b.store(value, place).align = 1

    def add_product(self, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
        """total + x y, rounded once."""
        kind = f"v{LANES}f32" if isinstance(total.type, ir.VectorType) else "f32"
        return self.call(f"llvm.fma.{kind}", total.type, x, y, total)

    def shuffled(self, x: ir.Value, y: ir.Value, places: list[int]) -> ir.Value:
        """The numbers at these places of x and, after it, y."""
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(places)), places))


def _signature(count: int) -> Any:
    return types.void(*[types.int64] * count)


def _copy(kind: ir.Type) -> Any:
    """What an intrinsic returns that copies a number or a vector from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Code(builder)
        source, target = (code.pointer(address) for address in arguments)
        code.store(code.load(source, _int(0), kind), target, _int(0))
        return context.get_dummy_value()

    return _signature(2), generate


@typed_intrinsic
def copy_vector(typing_context: Any, source: Any, target: Any) -> Any:
    """LANES numbers from one place to another."""
    return _copy(VECTOR)


@typed_intrinsic
def copy_number(typing_context: Any, source: Any, target: Any) -> Any:
    """One number from one place to another."""
    return _copy(FLOAT)


@typed_intrinsic
def turn_piece(typing_context: Any, source: Any, step: Any, target: Any) -> Any:
    """PIECE numbers of each of LANES rows, `step` apart: they become PIECE vectors of a panel.

    Within every 128 bits of a vector a square of 4 by 4 is transposed, rows 0 to 3 in the first, 4 to 7
    in the second.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Code(builder)
        source, step, target = arguments
        source, target = code.pointer(source), code.pointer(target)
        quarter = ir.VectorType(FLOAT, PIECE)

        def row_of_squares(row: int) -> ir.Value:
            """Row `row` of every square, side by side."""
            parts = [
                code.load(source, builder.mul(step, _int(first + row)), quarter)
                for first in range(0, LANES, PIECE)
            ]
            while len(parts) > 1:
                both = list(range(2 * parts[0].type.count))
                parts = [
                    code.shuffled(*pair, both) for pair in zip(parts[::2], parts[1::2], strict=True)
                ]
            return parts[0]

        def in_squares(x: ir.Value, y: ir.Value, places: list[int]) -> ir.Value:
            """The same places of each square: 0 to 3 are x's numbers, 4 to 7 are y's."""
            spread = [
                first + place if place < PIECE else LANES + first + place - PIECE
                for first in range(0, LANES, PIECE)
                for place in places
            ]
            return code.shuffled(x, y, spread)

        rows = [row_of_squares(row) for row in range(PIECE)]
        turned = []
        for half in ([0, 4, 1, 5], [2, 6, 3, 7]):
            upper, lower = in_squares(rows[0], rows[1], half), in_squares(rows[2], rows[3], half)
            turned += [in_squares(upper, lower, [0, 1, 4, 5]), in_squares(upper, lower, [2, 3, 6, 7])]
        for place, vector in enumerate(turned):
            code.store(vector, target, _int(place * COLUMNS * NUMBER))
        return context.get_dummy_value()

    return _signature(3), generate


@literal_intrinsic
def multiply_tile(
    typing_context: Any,
    kind: Any, a: Any, row_step: Any, rows: Any, inputs: Any, panel: Any,
    c: Any, c_step: Any, columns: Any, alpha: Any, beta: Any,
) -> Any:  # fmt: skip
    """c = alpha a b + beta c for one tile; with beta = 0, c is not read.

    kind: AS_THEY_LIE, a has `rows` rows of `inputs` numbers, `row_step` apart; or COPIED, LANES numbers
    an input, of which `rows` count. The steps between inputs are constants: else the compiler keeps
    every sum of two steps on the stack. panel: b, COLUMNS numbers an input, of which `columns` count.
    """
    copied = kind.literal_value == COPIED
    signature = types.void(kind, *[types.int64] * 8, types.float32, types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, a, row_step, rows, inputs, panel, c, c_step, columns, alpha, beta = arguments
        code = _Code(builder)
        a, panel, c = (code.pointer(address) for address in (a, panel, c))
        last = builder.sub(rows, _int(1))
        # A tile of fewer rows computes its last one several times, which costs nothing more.
        row_numbers = [
            builder.select(builder.icmp_signed("<", _int(row), last), _int(row), last)
            for row in range(ROWS)
        ]
        row_offsets = [
            _int(row * NUMBER) if copied else builder.mul(number, row_step)
            for row, number in enumerate(row_numbers)
        ]
        input_step = (LANES if copied else 1) * NUMBER
        c_offsets = [builder.mul(number, c_step) for number in row_numbers]
        for offset in c_offsets:  # they come from memory while the sums are made
            for end in (0, COLUMNS * NUMBER - 1):
                place = builder.gep(c, [builder.add(offset, _int(end))])
                code.call("llvm.prefetch.p0", ir.VoidType(), place, FETCH_TO_WRITE, KEPT_CLOSE, DATA)

        def add_inputs(count: int, first: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            here = builder.gep(a, [builder.mul(first, _int(input_step))])
            there = builder.gep(panel, [builder.mul(first, _int(COLUMNS * NUMBER))])
            for further in range(count):
                starts = [
                    _int((further * VECTORS + vector) * LANES * NUMBER) for vector in range(VECTORS)
                ]
                loaded = [code.load(there, start, VECTOR) for start in starts]
                spread = [code.spread(code.load(here, offset, FLOAT)) for offset in row_offsets]
                sums = [
                    code.add_product(spread[i // VECTORS], loaded[i % VECTORS], total)
                    for i, total in enumerate(sums)
                ]
                here = builder.gep(here, [_int(input_step)])
            return sums

        sums: list[ir.Value] = [ir.Constant(VECTOR, [0.0] * LANES)] * (ROWS * VECTORS)
        done: ir.Value = _int(0)
        for count in (UNROLLED, 1):
            done, sums = code.loop(done, inputs, count, sums, partial(add_inputs, count))
        sums = [builder.fmul(code.spread(alpha), total) for total in sums]
        overwrites = builder.fcmp_ordered("==", beta, ir.Constant(FLOAT, 0.0))
        whole = builder.and_(
            builder.icmp_signed("==", rows, _int(ROWS)),
            builder.icmp_signed("==", columns, _int(COLUMNS)),
        )

        def put(values: list[tuple[ir.Value, ir.Value]], factor: ir.Value) -> None:
            """Each value to its offset in c."""
            with builder.if_else(overwrites) as (without_c, with_c):
                with without_c:
                    for value, offset in values:
                        code.store(value, c, offset)
                with with_c:
                    for value, offset in values:
                        before = code.load(c, offset, value.type)
                        code.store(code.add_product(factor, before, value), c, offset)

        with builder.if_else(whole) as (in_vectors, one_by_one):
            with in_vectors:
                offsets = [
                    builder.add(offset, _int(vector * LANES * NUMBER))
                    for offset in c_offsets
                    for vector in range(VECTORS)
                ]
                put(list(zip(sums, offsets, strict=True)), code.spread(beta))
            with one_by_one:
                room = ir.ArrayType(FLOAT, ROWS * COLUMNS)
                tile = builder.bitcast(
                    cgutils.alloca_once(builder, room),  # type: ignore[no-untyped-call]
                    I8.as_pointer(),
                )
                for i, total in enumerate(sums):
                    code.store(total, tile, _int(i * LANES * NUMBER))
                with (
                    cgutils.for_range(builder, rows) as row,
                    cgutils.for_range(builder, columns) as column,
                ):
                    across = builder.mul(column.index, _int(NUMBER))
                    at = builder.add(builder.mul(row.index, _int(COLUMNS * NUMBER)), across)
                    value = code.load(tile, at, FLOAT)
                    put([(value, builder.add(builder.mul(row.index, c_step), across))], beta)
        return context.get_dummy_value()

    return signature, generate
