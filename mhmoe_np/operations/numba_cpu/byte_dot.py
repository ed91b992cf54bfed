"""The innermost loop of packed products: int8 activations times packed codes.

The int32 sums of one tile (see `tiles`) are held in registers over all inputs. A vector has the sums of
16 outputs in 512 bits, of 8 in 256.

Weights are the unsigned operand (codes), activations the signed one, so neither needs an offset here:
sum_i q (lowest + step code) = lowest * sum_i q + step * sum_i q code is left to the caller.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from mhmoe_np.operations.numba_cpu.compiling import literal_intrinsic
from mhmoe_np.operations.numba_cpu.emitter import Emitter
from mhmoe_np.operations.numba_cpu.tiles import ALONE, TILES
from mhmoe_np.operations.numba_cpu.vector_code import I8, I32, I64, constant
from mhmoe_np.operations.packing import FORMATS, PANEL, PLACES


class _Operands(NamedTuple):
    """Where a tile reads: the first byte of each row of activations and of each vector of codes."""

    activation_rows: list[ir.Value]
    code_vectors: list[ir.Value]
    groups: ir.Value

    def codes(self, emit: Emitter, group: ir.Value) -> list[ir.Value]:
        """One group of each vector, still packed."""
        offset = emit.b.mul(group, ir.Constant(I64, PANEL * PLACES))
        return [emit.load(pointer, offset, emit.v32) for pointer in self.code_vectors]

    def activations(self, emit: Emitter, group: ir.Value, row: int) -> list[ir.Value]:
        """The four activations that each quad of a group meets, in all lanes."""
        start = emit.b.mul(group, ir.Constant(I64, emit.format.group))
        return [
            emit.spread(
                emit.load(
                    self.activation_rows[row],
                    emit.b.add(start, ir.Constant(I64, PLACES * quad)),
                    I32,
                )
            )
            for quad in range(emit.format.depth)
        ]


def _emit_tile(emit: Emitter, operands: _Operands) -> list[ir.Value]:
    """The sums of each row and vector, row by row."""
    rows, vectors = len(operands.activation_rows), len(operands.code_vectors)

    def body(group: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        codes = [emit.quads(raw) for raw in operands.codes(emit, group)]
        met = [operands.activations(emit, group, row) for row in range(rows)]
        return [
            emit.dot(total, codes[place % vectors], met[place // vectors])
            for place, total in enumerate(sums)
        ]

    zeros = [constant(emit.v32, 0)] * (rows * vectors)
    return emit.loop(ir.Constant(I64, 0), operands.groups, 1, zeros, body)[1]


def _emit_row_in_place(emit: Emitter, operands: _Operands) -> list[ir.Value]:
    """A single row with vpdpbusd: each quad b has sums of its own, 2^(bits b) times too large.

    Shifting those down once at the end saves the shifts inside. The largest, 128 * 128 * I / depth,
    fits an int32 for every I that is exact.
    """
    depth, bits = emit.format.depth, 8 // emit.format.depth

    def body(group: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        met = operands.activations(emit, group, 0)
        new = []
        for vector, raw in enumerate(operands.codes(emit, group)):
            for quad, code in enumerate(emit.scaled_quads(raw)):
                new.append(emit.dot(sums[vector * depth + quad], [code], [met[quad]]))
        return new

    zeros = [constant(emit.v32, 0)] * (len(operands.code_vectors) * depth)
    _, sums = emit.loop(ir.Constant(I64, 0), operands.groups, 1, zeros, body)
    return [emit.scaled_down(sums[first : first + depth], bits) for first in range(0, len(sums), depth)]


def _emit_row_by_nibbles(emit: Emitter, operands: _Operands) -> list[ir.Value]:
    """A single row with vpmaddubsw: one shift for a byte instead of one for each quad.

    Quads stay where they are in the lower and the upper nibble, 1, 2, 4 or 8 times too large; quads
    of the same factor share their sums. A sum of one group is at most 2 * 2 * 8 * 128 = 4096 in
    magnitude, so four groups are added up in int16 before they are widened.
    """
    b, depth = emit.b, emit.format.depth
    factors, bits = depth // 2, 8 // depth
    masks = [
        constant(emit.v32, 0x01010101 * (2**bits - 1) << bits * factor) for factor in range(factors)
    ]
    ones = constant(emit.v16, 1)

    def body(step: int, group: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        narrow: list[ir.Value | None] = [None] * len(sums)
        for further in range(step):
            here = b.add(group, ir.Constant(I64, further))
            met = operands.activations(emit, here, 0)
            for vector, raw in enumerate(operands.codes(emit, here)):
                nibbles = (raw, b.lshr(raw, constant(emit.v32, 4)))
                for quad in range(depth):
                    place = vector * factors + quad % factors
                    code = b.and_(nibbles[quad // factors], masks[quad % factors])
                    pair = emit.pair_sums(code, met[quad])
                    earlier = narrow[place]
                    narrow[place] = pair if earlier is None else b.add(earlier, pair)
        return [
            b.add(total, emit.call("llvm.x86.avx2.pmadd.wd", emit.v32, part, ones))
            for total, part in zip(sums, narrow, strict=True)
        ]

    sums = [constant(emit.v32, 0)] * (len(operands.code_vectors) * factors)
    group: ir.Value = ir.Constant(I64, 0)
    for step in (4, 1):
        group, sums = emit.loop(group, operands.groups, step, sums, partial(body, step))
    return [
        emit.scaled_down(sums[first : first + factors], bits) for first in range(0, len(sums), factors)
    ]


# What beats `_emit_tile` for a single row.
_ROW_EMITTERS = {
    "avx512vnni": _emit_row_in_place,
    "avxvnni": _emit_row_in_place,
    "avx2": _emit_row_by_nibbles,
}


@literal_intrinsic
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
        emit = Emitter(builder, instruction_set, format)

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
