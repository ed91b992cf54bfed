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

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.operations.packing import FORMATS, PANEL, PLACES, FormatName, PackingFormat

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))

ALONE, MANY, FOUR, TWO, ONE, FOUR_BY_ONE, ONE_BY_ONE = range(7)
"""The tiles of one instruction set: for a single row, and for more rows in falling number; the last
two are for vectors left over."""


class Tiles(NamedTuple):
    """How an instruction set cuts a product."""

    lanes: int  # int32 sums of a vector
    many: int  # rows of the largest tile
    across: int  # vectors of a tile
    alone: dict[FormatName, int]  # vectors of a tile of a single row; whole panels

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
    "avxvnni": Tiles(8, 6, 2, {"ternary-2bit": 2, "ternary-base3": 4, "sign-1bit": 2}),
    "avx2": Tiles(8, 8, 1, {"ternary-2bit": 2, "ternary-base3": 4, "sign-1bit": 2}),
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

    def scaled_down(self, sums: list[ir.Value], bits: int) -> ir.Value:
        """sum_f sums[f] / 2^(bits f), all of them exact."""
        total = sums[0]
        for factor, value in enumerate(sums[1:], start=1):
            total = self.b.add(total, self.b.ashr(value, _constant(self.v32, bits * factor)))
        return total

    def pair_sums(self, code: ir.Value, activation: ir.Value) -> ir.Value:
        """Products of neighbouring bytes, unsigned by signed, summed to int16."""
        return self.call(
            "llvm.x86.avx2.pmadd.ub.sw",
            self.v16,
            self.b.bitcast(code, self.v8),
            self.b.bitcast(activation, self.v8),
        )

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
            pairs = [self.pair_sums(*pair) for pair in zip(codes, activations, strict=True)]
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


def _loop(
    b: ir.IRBuilder,
    first: ir.Value,
    end: ir.Value,
    step: int,
    sums: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> tuple[ir.Value, list[ir.Value]]:
    """While `step` more groups fit before `end`: sums = body(group, sums). Return both at last."""
    before = b.block
    test, inside, after = (b.append_basic_block(name) for name in ("test", "groups", "after"))
    b.branch(test)
    b.position_at_end(test)
    group = b.phi(I64)
    group.add_incoming(first, before)
    phis = [b.phi(value.type) for value in sums]
    for phi, value in zip(phis, sums, strict=True):
        phi.add_incoming(value, before)
    following = b.add(group, ir.Constant(I64, step))
    b.cbranch(b.icmp_signed("<=", following, end), inside, after)
    b.position_at_end(inside)
    new = body(group, phis)
    group.add_incoming(following, b.block)
    for phi, value in zip(phis, new, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(test)
    b.position_at_end(after)
    return group, phis


class _Operands(NamedTuple):
    """Where a tile reads: the first byte of each row of activations and of each vector of codes."""

    activation_rows: list[ir.Value]
    code_vectors: list[ir.Value]
    groups: ir.Value

    def codes(self, emit: _Emitter, group: ir.Value) -> list[ir.Value]:
        """One group of each vector, still packed."""
        offset = emit.b.mul(group, ir.Constant(I64, PANEL * PLACES))
        return [emit.load(pointer, offset, emit.v32) for pointer in self.code_vectors]

    def activations(self, emit: _Emitter, group: ir.Value, row: int) -> list[ir.Value]:
        """The four activations that each block of a group meets, in all lanes."""
        start = emit.b.mul(group, ir.Constant(I64, emit.format.group))
        return [
            emit.spread(
                emit.load(
                    self.activation_rows[row],
                    emit.b.add(start, ir.Constant(I64, PLACES * block)),
                    I32,
                )
            )
            for block in range(emit.format.depth)
        ]


def _emit_tile(emit: _Emitter, operands: _Operands) -> list[ir.Value]:
    """The sums of each row and vector, row by row."""
    rows, vectors = len(operands.activation_rows), len(operands.code_vectors)

    def body(group: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        codes = [emit.blocks(raw) for raw in operands.codes(emit, group)]
        met = [operands.activations(emit, group, row) for row in range(rows)]
        return [
            emit.dot(total, codes[place % vectors], met[place // vectors])
            for place, total in enumerate(sums)
        ]

    zeros = [_constant(emit.v32, 0)] * (rows * vectors)
    return _loop(emit.b, ir.Constant(I64, 0), operands.groups, 1, zeros, body)[1]


def _emit_row_in_place(emit: _Emitter, operands: _Operands) -> list[ir.Value]:
    """A single row with vpdpbusd: each block has sums of its own, 2^(bits b) times too large.

    Shifting those down once at the end saves the shifts inside. The largest, 128 * 128 * I / depth,
    fits an int32 for every I that is exact.
    """
    depth, bits = emit.format.depth, 8 // emit.format.depth

    def body(group: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        met = operands.activations(emit, group, 0)
        new = []
        for vector, raw in enumerate(operands.codes(emit, group)):
            for block, code in enumerate(emit.scaled_blocks(raw)):
                new.append(emit.dot(sums[vector * depth + block], [code], [met[block]]))
        return new

    zeros = [_constant(emit.v32, 0)] * (len(operands.code_vectors) * depth)
    _, sums = _loop(emit.b, ir.Constant(I64, 0), operands.groups, 1, zeros, body)
    return [emit.scaled_down(sums[first : first + depth], bits) for first in range(0, len(sums), depth)]


def _emit_row_by_nibbles(emit: _Emitter, operands: _Operands) -> list[ir.Value]:
    """A single row with vpmaddubsw: one shift for a byte instead of one for each block.

    Blocks stay where they are in the lower and the upper nibble, 1, 2, 4 or 8 times too large; blocks
    of the same factor share their sums. A sum of one group is at most 2 * 2 * 8 * 128 = 4096 in
    magnitude, so four groups are added up in int16 before they are widened.
    """
    b, depth = emit.b, emit.format.depth
    factors, bits = depth // 2, 8 // depth
    masks = [
        _constant(emit.v32, 0x01010101 * (2**bits - 1) << bits * factor) for factor in range(factors)
    ]
    ones = _constant(emit.v16, 1)

    def body(step: int, group: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        narrow: list[ir.Value | None] = [None] * len(sums)
        for further in range(step):
            here = b.add(group, ir.Constant(I64, further))
            met = operands.activations(emit, here, 0)
            for vector, raw in enumerate(operands.codes(emit, here)):
                nibbles = (raw, b.lshr(raw, _constant(emit.v32, 4)))
                for block in range(depth):
                    place = vector * factors + block % factors
                    code = b.and_(nibbles[block // factors], masks[block % factors])
                    pair = emit.pair_sums(code, met[block])
                    earlier = narrow[place]
                    narrow[place] = pair if earlier is None else b.add(earlier, pair)
        return [
            b.add(total, emit.call("llvm.x86.avx2.pmadd.wd", emit.v32, part, ones))
            for total, part in zip(sums, narrow, strict=True)
        ]

    sums = [_constant(emit.v32, 0)] * (len(operands.code_vectors) * factors)
    group: ir.Value = ir.Constant(I64, 0)
    for step in (4, 1):
        group, sums = _loop(b, group, operands.groups, step, sums, partial(body, step))
    return [
        emit.scaled_down(sums[first : first + factors], bits) for first in range(0, len(sums), factors)
    ]


# What beats `_emit_tile` for a single row.
_ROW_EMITTERS = {
    "avx512vnni": _emit_row_in_place,
    "avxvnni": _emit_row_in_place,
    "avx2": _emit_row_by_nibbles,
}


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
    emit_sums = _emit_tile
    if kind.literal_value == ALONE and format.name != "ternary-base3":
        emit_sums = _ROW_EMITTERS.get(instruction_set, _emit_tile)

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
        sums = emit_sums(emit, _Operands(activation_rows, code_vectors, groups))
        for place, value in enumerate(sums):
            pointer = builder.gep(tile_bytes, [number(place * tiles.lanes * 4)])
            store = builder.store(value, builder.bitcast(pointer, emit.v32.as_pointer()))
            store.align = 4
        return context.get_dummy_value()

    return signature, generate
