"""The innermost loop of packed products: int8 activations times packed codes, in LLVM's terms.

One tile is some rows of activations against some vectors of outputs (16 outputs in 512 bits, 8 in 256),
its int32 sums held in registers over all inputs. A step of the loop loads one group of each vector,
takes its blocks of codes apart in place, and feeds each block, with the four activations it meets
broadcast to all lanes, to the processor's product of unsigned by signed bytes:

    avx512vnni, avxvnni   vpdpbusd: four products and their sum added to an int32, never saturating
    avx2                  vpmaddubsw: two products summed to an int16, at most 2 * 2 * 128 = 512 in
                          magnitude, so a byte's blocks are added up in int16 (at most 8 * 256, 5 * 512)
                          before vpmaddwd widens them
    portable              the same sums in plain vector arithmetic

Weights are the unsigned operand (codes), activations the signed one, so neither needs an offset here:
sum_i q (lowest + step code) = lowest * sum_i q + step * sum_i q code is left to the caller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.packing import FORMATS, PANEL, PLACES, FormatName, PackingFormat

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))

ALONE, MANY, FOUR, TWO, ONE, FOUR_BY_ONE, ONE_BY_ONE = range(7)
"""The tiles of one instruction set: for a single row, and for more rows in falling number; the last
two are for vectors left over."""


class Tiles(NamedTuple):
    """How an instruction set cuts a product."""

    lanes: int  # int32 sums of a vector
    many: int  # rows of the largest tile
    across: int  # vectors of a tile
    alone: dict[FormatName, int]  # vectors of a tile of a single row

    def rows_and_vectors(self, kind: int, format: FormatName) -> tuple[int, int]:
        """The size of a tile."""
        return {
            ALONE: (1, self.alone[format]),
            MANY: (self.many, self.across),
            FOUR: (4, self.across),
            TWO: (2, self.across),
            ONE: (1, self.across),
            FOUR_BY_ONE: (4, 1),
            ONE_BY_ONE: (1, 1),
        }[kind]


# Measured (benchmarks.packed): larger tiles spill registers, smaller ones unpack too often.
TILES: dict[InstructionSet, Tiles] = {
    "avx512vnni": Tiles(16, 6, 4, {"ternary-2bit": 4, "ternary-base3": 8, "sign-1bit": 2}),
    "avxvnni": Tiles(8, 6, 2, {"ternary-2bit": 2, "ternary-base3": 4, "sign-1bit": 1}),
    "avx2": Tiles(8, 8, 1, {"ternary-2bit": 4, "ternary-base3": 4, "sign-1bit": 4}),
    "portable": Tiles(8, 4, 1, {"ternary-2bit": 2, "ternary-base3": 2, "sign-1bit": 2}),
}
MOST_SUMS = 6 * 4 * 16  # of one tile, over all instruction sets


def _constant(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


class _Emitter:
    """Emits the loop of one tile into `builder`."""

    def __init__(
        self, builder: ir.IRBuilder, instruction_set: InstructionSet, format: PackingFormat
    ) -> None:
        self.b, self.instruction_set, self.format = builder, instruction_set, format
        lanes = TILES[instruction_set].lanes
        self.v8 = ir.VectorType(I8, 4 * lanes)
        self.v16 = ir.VectorType(I16, 2 * lanes)
        self.v32 = ir.VectorType(I32, lanes)

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """An instruction of the target."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        module = self.b.module
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return self.b.call(function, arguments)

    def load(self, pointer: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
        """An unaligned load at a byte offset."""
        value = self.b.load(self.b.bitcast(self.b.gep(pointer, [offset]), kind.as_pointer()))
        value.align = 1
        return value

    def spread(self, value: ir.Value) -> ir.Value:
        """One int32 in every lane."""
        undefined = ir.Constant(self.v32, ir.Undefined)
        one = self.b.insert_element(undefined, value, ir.Constant(I32, 0))
        lanes = ir.Constant(ir.VectorType(I32, self.v32.count), [0] * self.v32.count)
        return self.b.shuffle_vector(one, undefined, lanes)

    def blocks(self, raw: ir.Value) -> list[ir.Value]:
        """The codes of each block in a loaded vector, as unsigned bytes."""
        if self.format.name == "ternary-base3":
            return self._digits(raw)
        bits = 8 // self.format.depth
        mask = _constant(self.v32, 0x01010101 * (2**bits - 1))
        shifted = [
            self.b.lshr(raw, _constant(self.v32, bits * block)) if block else raw
            for block in range(self.format.depth)
        ]
        return [self.b.and_(value, mask) for value in shifted]

    def scaled_blocks(self, raw: ir.Value) -> list[ir.Value]:
        """The same without shifting them down: block b is 2^(bits b) times its codes."""
        bits = 8 // self.format.depth
        return [
            self.b.and_(raw, _constant(self.v32, 0x01010101 * (2**bits - 1) << bits * block))
            for block in range(self.format.depth)
        ]

    def _digits(self, raw: ir.Value) -> list[ir.Value]:
        """Base 3: triple the byte, kept in the upper half of 16 bits; the digit comes out on top."""
        eight, three = _constant(self.v16, 8), _constant(self.v16, 3)
        odd = self.b.and_(self.b.bitcast(raw, self.v16), _constant(self.v16, 0xFF00))
        even = self.b.shl(self.b.bitcast(raw, self.v16), eight)
        digits = []
        for _ in range(self.format.depth):
            codes = self.b.or_(self._above(even, three), self.b.shl(self._above(odd, three), eight))
            digits.append(self.b.bitcast(codes, self.v32))
            even, odd = self.b.mul(even, three), self.b.mul(odd, three)
        return digits

    def _above(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The upper 16 bits of products of unsigned 16-bit integers."""
        if self.instruction_set == "portable":
            wide = ir.VectorType(I32, self.v16.count)
            product = self.b.mul(self.b.zext(x, wide), self.b.zext(y, wide))
            return self.b.trunc(self.b.lshr(product, _constant(wide, 16)), self.v16)
        width = "avx512.pmulhu.w.512" if self.v16.count == 32 else "avx2.pmulhu.w"
        return self.call(f"llvm.x86.{width}", self.v16, x, y)

    def dot(self, sums: ir.Value, codes: list[ir.Value], activations: list[ir.Value]) -> ir.Value:
        """Add the products of a byte's blocks, four inputs each, to the sums."""
        if self.instruction_set in ("avx512vnni", "avxvnni"):
            name = f"llvm.x86.avx512.vpdpbusd.{32 * self.v32.count}"
            for code, activation in zip(codes, activations, strict=True):
                sums = self.call(name, self.v32, sums, code, activation)
            return sums
        if self.instruction_set == "avx2":
            pairs = [
                self.call(
                    "llvm.x86.avx2.pmadd.ub.sw",
                    self.v16,
                    self.b.bitcast(code, self.v8),
                    self.b.bitcast(activation, self.v8),
                )
                for code, activation in zip(codes, activations, strict=True)
            ]
            total = pairs[0]
            for pair in pairs[1:]:
                total = self.b.add(total, pair)
            ones = _constant(self.v16, 1)
            return self.b.add(sums, self.call("llvm.x86.avx2.pmadd.wd", self.v32, total, ones))
        return self._plain_dot(sums, codes, activations)

    def _plain_dot(
        self, sums: ir.Value, codes: list[ir.Value], activations: list[ir.Value]
    ) -> ir.Value:
        for code, activation in zip(codes, activations, strict=True):
            for place in range(PLACES):
                down = _constant(self.v32, 8 * place)
                one = self.b.and_(self.b.lshr(code, down), _constant(self.v32, 0xFF))
                up = self.b.shl(activation, _constant(self.v32, 24 - 8 * place))
                signed = self.b.ashr(up, _constant(self.v32, 24))
                sums = self.b.add(sums, self.b.mul(one, signed))
        return sums


def _emit_tile(
    emit: _Emitter,
    size: tuple[int, int],
    in_place: bool,
    activation_rows: list[ir.Value],
    code_vectors: list[ir.Value],
    groups: ir.Value,
) -> list[list[ir.Value]]:
    """The loop over groups; the sums of each row and vector.

    in_place: each block has sums of its own, 2^(bits b) times too large; shifting them down once at the
    end saves the shifts inside. The largest, 128 * 128 * I / depth, fits for all I that are exact.
    """
    b, (rows, vectors), depth = emit.b, size, emit.format.depth
    parts = depth if in_place else 1
    zero = _constant(emit.v32, 0)
    before = b.block
    loop, after = b.append_basic_block("groups"), b.append_basic_block("sums")
    b.branch(loop)
    b.position_at_end(loop)
    group = b.phi(I64)
    group.add_incoming(ir.Constant(I64, 0), before)
    sums = [[[b.phi(emit.v32) for _ in range(parts)] for _ in range(vectors)] for _ in range(rows)]
    for phi in (part for row in sums for vector in row for part in vector):
        phi.add_incoming(zero, before)
    code_offset = b.mul(group, ir.Constant(I64, PANEL * PLACES))
    row_offset = b.mul(group, ir.Constant(I64, emit.format.group))
    raw = [emit.load(pointer, code_offset, emit.v32) for pointer in code_vectors]

    def activations(row: int) -> list[ir.Value]:
        offsets = [b.add(row_offset, ir.Constant(I64, PLACES * block)) for block in range(depth)]
        return [emit.spread(emit.load(activation_rows[row], offset, I32)) for offset in offsets]

    new: dict[tuple[int, int, int], ir.Value] = {}
    codes = [emit.scaled_blocks(x) if in_place else emit.blocks(x) for x in raw]
    for row in range(rows):
        met = activations(row)
        for vector in range(vectors):
            if in_place:
                for block in range(depth):
                    new[row, vector, block] = emit.dot(
                        sums[row][vector][block], [codes[vector][block]], [met[block]]
                    )
            else:
                new[row, vector, 0] = emit.dot(sums[row][vector][0], codes[vector], met)
    following = b.add(group, ir.Constant(I64, 1))
    group.add_incoming(following, b.block)
    for (row, vector, part), value in new.items():
        sums[row][vector][part].add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, groups), loop, after)
    b.position_at_end(after)
    bits = 8 // depth
    totals: list[list[ir.Value]] = []
    for row in range(rows):
        totals.append([])
        for vector in range(vectors):
            total = new[row, vector, 0]
            for block in range(1, parts):
                down = _constant(emit.v32, bits * block)
                total = b.add(total, b.ashr(new[row, vector, block], down))
            totals[row].append(total)
    return totals


def _intrinsic(definition: Any) -> Any:
    """`intrinsic`, whose type hints describe the definition and not the call."""
    return intrinsic(prefer_literal=True)(definition)


@_intrinsic
def dot_tile(
    typing_context: Any,
    weight: Any,
    kind: Any,
    q: Any,
    first_row: Any,
    code_offset: Any,
    groups: Any,
    tile: Any,
) -> Any:
    """Fill `tile` with the int32 sums of one tile, row by row.

    weight: an instance of a class of `packed.CLASSES`; kind: ALONE, MANY, ...; q: int8 [rows, inputs],
    padded with zeros to whole groups; code_offset: the byte of the weight's code where the tile's first
    vector starts; groups: of one panel; tile: int32, flat.
    """
    signature = types.void(weight, kind, q, types.intp, types.intp, types.intp, tile)
    instruction_set = weight.instance_class.instruction_set
    format = FORMATS[weight.instance_class.format]
    tiles = TILES[instruction_set]
    rows, vectors = tiles.rows_and_vectors(kind.literal_value, format.name)
    in_place = (
        kind.literal_value == ALONE and "vnni" in instruction_set and format.name != "ternary-base3"
    )

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weight, _, q, first_row, code_offset, groups, tile = arguments
        emit = _Emitter(builder, instruction_set, format)

        def number(value: int) -> ir.Constant:
            return ir.Constant(I64, value)

        def opened(kind: Any, array: Any) -> tuple[ir.Value, ir.Value]:
            """The address of an array and its first stride, in bytes."""
            made = context.make_array(kind)(context, builder, array)
            address = builder.bitcast(made.data, I8.as_pointer())
            return address, builder.extract_value(made.strides, 0)

        q_bytes, stride = opened(signature.args[2], q)
        code_bytes, _ = opened(signature.args[0][0], builder.extract_value(weight, 0))
        tile_bytes, _ = opened(signature.args[6], tile)
        activation_rows = [
            builder.gep(q_bytes, [builder.mul(builder.add(first_row, number(row)), stride)])
            for row in range(rows)
        ]
        halves = PANEL // tiles.lanes
        panel_bytes = builder.mul(groups, number(PANEL * PLACES))
        code_vectors = []
        for vector in range(vectors):
            inside = number(vector % halves * tiles.lanes * PLACES)
            start = builder.add(builder.mul(panel_bytes, number(vector // halves)), inside)
            code_vectors.append(builder.gep(code_bytes, [builder.add(code_offset, start)]))
        totals = _emit_tile(emit, (rows, vectors), in_place, activation_rows, code_vectors, groups)
        for row in range(rows):
            for vector in range(vectors):
                place = number((row * vectors + vector) * tiles.lanes * 4)
                pointer = builder.gep(tile_bytes, [place])
                store = builder.store(
                    totals[row][vector], builder.bitcast(pointer, emit.v32.as_pointer())
                )
                store.align = 4
        return context.get_dummy_value()

    return signature, generate
