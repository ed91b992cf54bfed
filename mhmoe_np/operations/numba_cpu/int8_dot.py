"""The innermost loop of products with 8-bit weights: a panel of 16 outputs against some rows.

A vector has the int32 sums of its outputs for one block of 32 inputs: eight quads, four inputs of each
output a quad. Then the sums become floats, are multiplied by the scales of weights and activations and
added to the floats of the blocks before. So no sum runs across the lanes, and every output has the
definition's bits: its blocks are added in their order.

Both operands are signed, and processors multiply unsigned bytes by signed ones:

    avx512vnni, avxvnni   the weights plus 128 are unsigned; sums start at -128 times the sum of the
                          block's activations, which the caller knows (`correction`)
    avx2                  |weight| times the activation with the weight's sign: at most 128 * 127 * 2
                          = 32,512 for a pair, which an int16 holds; so activations must not be -128
    portable              byte by byte, in int32
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from mhmoe_np.operations.int8 import BLOCK, QUADS
from mhmoe_np.operations.numba_cpu.compiling import literal_intrinsic
from mhmoe_np.operations.numba_cpu.emitter import Vectors
from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.operations.numba_cpu.vector_code import I8, I16, I32, I64, constant
from mhmoe_np.operations.packing import PANEL, PLACES

MANY, TWO, ONE = range(3)
"""The tiles of an instruction set, in falling number of rows. More rows share the loads of weights."""

# Not measured against others: the sums of so many rows and what they are made of fit the registers.
MOST_ROWS: dict[InstructionSet, int] = {"avx512vnni": 8, "avxvnni": 4, "avx2": 4, "portable": 4}
REALS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
GROUP_BYTES = PANEL * PLACES


class _SignedDot(Vectors):
    """Products of signed bytes, four to a lane."""

    def weights(self, raw: ir.Value) -> tuple[ir.Value, ...]:
        """A loaded vector of weights as `dot` wants it: taken apart once for all rows."""
        if self.instruction_set in ("avx512vnni", "avxvnni"):
            return (self.b.xor(raw, self._bytes(0x80)),)
        if self.instruction_set == "avx2":
            signed = self.b.bitcast(raw, self.v8)
            size = self.call(
                f"llvm.abs.v{self.v8.count}i8", self.v8, signed, ir.Constant(ir.IntType(1), 0)
            )
            return raw, self.b.bitcast(size, self.v32)
        return tuple(self._place(raw, place) for place in range(PLACES))

    def start(self, correction: ir.Value) -> ir.Value:
        """The sums of a block before any product."""
        if self.instruction_set in ("avx512vnni", "avxvnni"):
            return self.spread(correction)
        return constant(self.v32, 0)

    def dot(self, sums: ir.Value, weights: tuple[ir.Value, ...], activations: ir.Value) -> ir.Value:
        """Add the products of a quad to the sums."""
        if self.instruction_set in ("avx512vnni", "avxvnni"):
            name = f"llvm.x86.avx512.vpdpbusd.{32 * self.v32.count}"
            return self.call(name, self.v32, sums, weights[0], activations)
        if self.instruction_set == "avx2":
            signed, size = weights
            turned = self.call(
                "llvm.x86.avx2.psign.b",
                self.v8,
                self.b.bitcast(activations, self.v8),
                self.b.bitcast(signed, self.v8),
            )
            pairs = self.pair_sums(size, turned)
            ones = constant(self.v16, 1)
            return self.b.add(sums, self.call("llvm.x86.avx2.pmadd.wd", self.v32, pairs, ones))
        for place, weight in enumerate(weights):
            sums = self.b.add(sums, self.b.mul(weight, self._place(activations, place)))
        return sums

    def floats_of_halves(self, halves: ir.Value) -> ir.Value:
        """float16 numbers that are not negative as float32, by their bits: exact, on any processor.

        Moved to float32's place, exponent and fraction say 2^-112 times the number.
        """
        floats = ir.VectorType(ir.FloatType(), self.v32.count)
        bits = self.b.shl(self.b.zext(halves, self.v32), constant(self.v32, 13))
        return self.b.fmul(
            self.b.bitcast(bits, floats), ir.Constant(floats, [2.0**112] * self.v32.count)
        )

    def _bytes(self, value: int) -> ir.Value:
        return constant(self.v32, value * 0x01010101 - 2**32)

    def _place(self, quad: ir.Value, place: int) -> ir.Value:
        """One signed byte of each lane, in int32."""
        up = self.b.shl(quad, constant(self.v32, 24 - 8 * place))
        return self.b.ashr(up, constant(self.v32, 24))


class _Operands(NamedTuple):
    """Where a tile reads: the first byte of its panel's weights and scales, and of each row's."""

    weights: ir.Value
    weight_scales: ir.Value
    activations: list[ir.Value]
    scales: list[ir.Value]
    corrections: list[ir.Value]
    real: ir.Type  # of the scales of activations, and of the outputs

    def sums(self, emit: _SignedDot, block: ir.Value) -> list[ir.Value]:
        """The int32 sums of one block, row by row, a vector for each."""
        b, width = emit.b, emit.v32.count * PLACES
        at_group = b.mul(block, _number(QUADS * GROUP_BYTES))
        at_quad = b.mul(block, _number(BLOCK))
        at_correction = b.mul(block, _number(4))
        vectors = range(GROUP_BYTES // width)
        starts = [emit.start(emit.load(row, at_correction, I32)) for row in self.corrections]
        sums = [start for start in starts for _ in vectors]
        for quad in range(QUADS):
            places = [b.add(at_group, _number(quad * GROUP_BYTES + v * width)) for v in vectors]
            taken = [emit.weights(emit.load(self.weights, place, emit.v32)) for place in places]
            place = b.add(at_quad, _number(quad * PLACES))
            met = [emit.spread(emit.load(row, place, I32)) for row in self.activations]
            sums = [
                emit.dot(total, taken[i % len(taken)], met[i // len(taken)])
                for i, total in enumerate(sums)
            ]
        return sums

    def factors(self, emit: _SignedDot, block: ir.Value) -> list[ir.Value]:
        """The products of both scales, in the order of the sums."""
        b, lanes = emit.b, emit.v32.count
        at_panel = b.mul(block, _number(PANEL * 2))
        halves = [
            emit.load(
                self.weight_scales, b.add(at_panel, _number(2 * first)), ir.VectorType(I16, lanes)
            )
            for first in range(0, PANEL, lanes)
        ]
        of_weights = [emit.floats_of_halves(part) for part in halves]
        if self.real == ir.DoubleType():
            of_weights = [b.fpext(part, ir.VectorType(self.real, lanes)) for part in of_weights]
        at_row = b.mul(block, _number(8 if self.real == ir.DoubleType() else 4))
        of_rows = [emit.spread(emit.load(row, at_row, self.real)) for row in self.scales]
        return [b.fmul(of_weight, of_row) for of_row in of_rows for of_weight in of_weights]


def _number(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def _emit_tile(emit: _SignedDot, operands: _Operands, blocks: ir.Value) -> list[ir.Value]:
    """The outputs of each row, a vector for each."""
    b, floats = emit.b, ir.VectorType(operands.real, emit.v32.count)

    def body(block: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
        sums, factors = operands.sums(emit, block), operands.factors(emit, block)
        return [
            b.fadd(total, b.fmul(b.sitofp(of_block, floats), factor))
            for total, of_block, factor in zip(totals, sums, factors, strict=True)
        ]

    vectors = len(operands.activations) * PANEL // emit.v32.count
    zeros = [ir.Constant(floats, [0.0] * emit.v32.count)] * vectors
    return emit.loop(_number(0), blocks, 1, zeros, body)[1]


@literal_intrinsic
def int8_tile(
    typing_context: Any,
    weight: Any,
    kind: Any,
    panel: Any,
    q: Any,
    scale: Any,
    correction: Any,
    first_row: Any,
    tile: Any,
) -> Any:
    """Fill `tile` with a panel's outputs of some rows, row by row, 16 of each.

    weight: an instance of a class of `int8_product.CLASSES`; kind: MANY, TWO or ONE; panel: its number
    in the whole stack; q: int8 [rows, inputs in whole blocks]; scale, correction: [rows, blocks]; tile:
    flat, of scale's type.
    """
    signature = types.void(weight, kind, types.intp, q, scale, correction, types.intp, tile)
    instruction_set = weight.instance_class.instruction_set
    rows = {MANY: MOST_ROWS[instruction_set], TWO: 2, ONE: 1}[kind.literal_value]
    real = REALS[scale.dtype]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weight, _, panel, q, scale, correction, first_row, tile = arguments
        kinds = signature.args

        def opened(kind: Any, array: Any) -> tuple[ir.Value, Any]:
            """The address of an array, and its description."""
            made = context.make_array(kind)(context, builder, array)
            return builder.bitcast(made.data, I8.as_pointer()), made

        def rows_of(kind: Any, array: Any) -> list[ir.Value]:
            """The address of each row of the tile."""
            address, made = opened(kind, array)
            stride = builder.extract_value(made.strides, 0)
            return [
                builder.gep(address, [builder.mul(builder.add(first_row, _number(row)), stride)])
                for row in range(rows)
            ]

        weights, _ = opened(kinds[0][0], builder.extract_value(weight, 0))
        weight_scales, made = opened(kinds[0][1], builder.extract_value(weight, 1))
        blocks = builder.extract_value(made.shape, 2)
        first_block = builder.mul(panel, blocks)
        operands = _Operands(
            builder.gep(weights, [builder.mul(first_block, _number(QUADS * GROUP_BYTES))]),
            builder.gep(weight_scales, [builder.mul(first_block, _number(PANEL * 2))]),
            rows_of(kinds[3], q),
            rows_of(kinds[4], scale),
            rows_of(kinds[5], correction),
            real,
        )
        outputs = _emit_tile(_SignedDot(builder, instruction_set), operands, blocks)
        tile_bytes, _ = opened(kinds[7], tile)
        size = kinds[7].dtype.bitwidth // 8
        for place, value in enumerate(outputs):
            pointer = builder.gep(tile_bytes, [_number(place * value.type.count * size)])
            store = builder.store(value, builder.bitcast(pointer, value.type.as_pointer()))
            store.align = size
        return context.get_dummy_value()

    return signature, generate
