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
LOW = ROWS // 2  # a tile of so many rows or fewer is computed as one of so many
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


class _Tile(_Code):
    """Emits the product of one tile; the arguments are those of `multiply_tile`."""

    def __init__(self, builder: ir.IRBuilder, copied: bool, arguments: Any) -> None:
        super().__init__(builder)
        a, row_step, self.rows, self.inputs, panel, c, self.c_step, self.columns, *factors = arguments
        self.a, self.panel, self.c = (self.pointer(address) for address in (a, panel, c))
        self.alpha, self.beta = factors
        last = builder.sub(self.rows, _int(1))
        # Of a tile of fewer rows its last one is computed several times.
        numbers = [
            builder.select(builder.icmp_signed("<", _int(row), last), _int(row), last)
            for row in range(ROWS)
        ]
        self.row_offsets = [
            _int(row * NUMBER) if copied else builder.mul(number, row_step)
            for row, number in enumerate(numbers)
        ]
        self.input_step = (LANES if copied else 1) * NUMBER
        self.c_offsets = [builder.mul(number, self.c_step) for number in numbers]
        self.overwrites = builder.fcmp_ordered("==", self.beta, ir.Constant(FLOAT, 0.0))
        room = ir.ArrayType(FLOAT, ROWS * COLUMNS)
        part = cgutils.alloca_once(builder, room)  # type: ignore[no-untyped-call]
        self.part = builder.bitcast(part, I8.as_pointer())

    def fetch(self) -> None:
        """Let c come from memory while the sums are made."""
        for offset in self.c_offsets:
            for end in (0, COLUMNS * NUMBER - 1):
                place = self.b.gep(self.c, [self.b.add(offset, _int(end))])
                self.call("llvm.prefetch.p0", ir.VoidType(), place, FETCH_TO_WRITE, KEPT_CLOSE, DATA)

    def sums(self, height: int, vectors: int) -> list[ir.Value]:
        """Of `height` rows and so many vectors of columns, row by row."""
        totals: list[ir.Value] = [ir.Constant(VECTOR, [0.0] * LANES)] * (height * vectors)
        done: ir.Value = _int(0)
        for count in (UNROLLED, 1):
            add_inputs = partial(self._add_inputs, count, self.row_offsets[:height], vectors)
            done, totals = self.loop(done, self.inputs, count, totals, add_inputs)
        return [self.b.fmul(self.spread(self.alpha), total) for total in totals]

    def _add_inputs(
        self,
        count: int,
        row_offsets: list[ir.Value],
        vectors: int,
        first: ir.Value,
        sums: list[ir.Value],
    ) -> list[ir.Value]:
        here = self.b.gep(self.a, [self.b.mul(first, _int(self.input_step))])
        there = self.b.gep(self.panel, [self.b.mul(first, _int(COLUMNS * NUMBER))])
        for further in range(count):
            starts = [_int((further * VECTORS + vector) * LANES * NUMBER) for vector in range(vectors)]
            loaded = [self.load(there, start, VECTOR) for start in starts]
            # Row by row: all rows' numbers at once leave sums without a register on some processors.
            numbers = (self.load(here, offset, FLOAT) for offset in row_offsets)
            factors = ((spread, vector) for spread in map(self.spread, numbers) for vector in loaded)
            sums = [self.add_product(*pair, total) for pair, total in zip(factors, sums, strict=True)]
            here = self.b.gep(here, [_int(self.input_step)])
        return sums

    def put_whole(self, sums: list[ir.Value]) -> None:
        """All sums of a whole tile to c."""
        offsets = [
            self.b.add(offset, _int(vector * LANES * NUMBER))
            for offset in self.c_offsets
            for vector in range(VECTORS)
        ]
        self._put(list(zip(sums, offsets, strict=True)), self.spread(self.beta))

    def put_part(self, sums: list[ir.Value], vectors: int) -> None:
        """The sums that count to c: whole vectors, and what is left of a row number by number."""
        for i, total in enumerate(sums):
            self.store(total, self.part, _int(i * LANES * NUMBER))
        with cgutils.for_range(self.b, self.rows) as row:
            from_row = self.b.mul(row.index, _int(vectors * LANES * NUMBER))
            to_row = self.b.mul(row.index, self.c_step)

            def put(kind: ir.Type, across: ir.Value, factor: ir.Value) -> None:
                value = self.load(self.part, self.b.add(from_row, across), kind)
                self._put([(value, self.b.add(to_row, across))], factor)

            for first in range(0, vectors * LANES, LANES):
                counts = self.b.icmp_signed("<=", _int(first + LANES), self.columns)
                with self.b.if_else(counts) as (whole, left):
                    with whole:
                        put(VECTOR, _int(first * NUMBER), self.spread(self.beta))
                    with left, cgutils.for_range(self.b, self.columns, _int(first)) as column:
                        put(FLOAT, self.b.mul(column.index, _int(NUMBER)), self.beta)

    def _put(self, values: list[tuple[ir.Value, ir.Value]], factor: ir.Value) -> None:
        """Each value to its offset in c, to which `factor` times what stood there is added."""
        with self.b.if_else(self.overwrites) as (without_c, with_c):
            with without_c:
                for value, offset in values:
                    self.store(value, self.c, offset)
            with with_c:
                for value, offset in values:
                    before = self.load(self.c, offset, value.type)
                    self.store(self.add_product(factor, before, value), self.c, offset)


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
        tile = _Tile(builder, copied, arguments[1:])
        tile.fetch()
        low = builder.icmp_signed("<=", tile.rows, _int(LOW))
        narrow = builder.icmp_signed("<=", tile.columns, _int(LANES))
        whole = builder.and_(
            builder.icmp_signed("==", tile.rows, _int(ROWS)),
            builder.icmp_signed("==", tile.columns, _int(COLUMNS)),
        )
        with builder.if_else(low) as (few_rows, many_rows):
            with few_rows, builder.if_else(narrow) as (one_vector, all_vectors):
                with one_vector:
                    tile.put_part(tile.sums(LOW, 1), 1)
                with all_vectors:
                    tile.put_part(tile.sums(LOW, VECTORS), VECTORS)
            with many_rows, builder.if_else(narrow) as (one_vector, all_vectors):
                with one_vector:
                    tile.put_part(tile.sums(ROWS, 1), 1)
                with all_vectors:
                    sums = tile.sums(ROWS, VECTORS)
                    with builder.if_else(whole) as (in_registers, by_rows):
                        with in_registers:
                            tile.put_whole(sums)
                        with by_rows:
                            tile.put_part(sums, VECTORS)
        return context.get_dummy_value()

    return signature, generate
