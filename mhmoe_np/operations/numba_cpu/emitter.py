"""Vector code in LLVM's terms for the loop of one tile, in the words of each instruction set.

A step of the loop loads one group of codes and takes it apart, in place, into its quads: the codes of
four inputs of each output. Each quad goes, with the four activations that it meets broadcast to all
lanes, into the processor's product of unsigned by signed bytes:

    avx512vnni, avxvnni   vpdpbusd: four products and their sum added to an int32, never saturating
    avx2                  vpmaddubsw: two products summed to an int16, at most 2 * 2 * 128 = 512 in
                          magnitude, so a byte's quads are added up in int16 (at most 8 * 256, 5 * 512)
                          before vpmaddwd widens them
    portable              the same sums in plain vector arithmetic
"""

from __future__ import annotations

from llvmlite import ir

from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.operations.numba_cpu.tiles import TILES
from mhmoe_np.operations.numba_cpu.vector_code import I8, I16, I32, VectorCode, constant
from mhmoe_np.operations.packing import PLACES, PackingFormat


class Vectors(VectorCode):
    """Emits vector code of bytes and the int32 sums of their products."""

    def __init__(self, builder: ir.IRBuilder, instruction_set: InstructionSet) -> None:
        super().__init__(builder, TILES[instruction_set].lanes)
        self.instruction_set = instruction_set
        self.v8 = ir.VectorType(I8, 4 * self.lanes)
        self.v16 = ir.VectorType(I16, 2 * self.lanes)
        self.v32 = ir.VectorType(I32, self.lanes)

    def pair_sums(self, code: ir.Value, activation: ir.Value) -> ir.Value:
        """Products of neighbouring bytes, unsigned by signed, summed to int16."""
        return self.call(
            "llvm.x86.avx2.pmadd.ub.sw",
            self.v16,
            self.b.bitcast(code, self.v8),
            self.b.bitcast(activation, self.v8),
        )


class Emitter(Vectors):
    """Emits the loop of one tile of packed codes."""

    def __init__(
        self, builder: ir.IRBuilder, instruction_set: InstructionSet, format: PackingFormat
    ) -> None:
        super().__init__(builder, instruction_set)
        self.format = format

    def quads(self, raw: ir.Value) -> list[ir.Value]:
        """The codes of each quad in a loaded vector, as unsigned bytes."""
        if self.format.name == "ternary-base3":
            return self._digits(raw)
        bits = 8 // self.format.depth
        mask = constant(self.v32, 0x01010101 * (2**bits - 1))
        shifted = [
            self.b.lshr(raw, constant(self.v32, bits * quad)) if quad else raw
            for quad in range(self.format.depth)
        ]
        return [self.b.and_(value, mask) for value in shifted]

    def scaled_quads(self, raw: ir.Value) -> list[ir.Value]:
        """The same without shifting them down: quad number b is 2^(bits b) times its codes."""
        bits = 8 // self.format.depth
        return [
            self.b.and_(raw, constant(self.v32, 0x01010101 * (2**bits - 1) << bits * quad))
            for quad in range(self.format.depth)
        ]

    def scaled_down(self, sums: list[ir.Value], bits: int) -> ir.Value:
        """sum_f sums[f] / 2^(bits f), all of them exact."""
        total = sums[0]
        for factor, value in enumerate(sums[1:], start=1):
            total = self.b.add(total, self.b.ashr(value, constant(self.v32, bits * factor)))
        return total

    def _digits(self, raw: ir.Value) -> list[ir.Value]:
        """Base 3: triple the byte, kept in the upper half of 16 bits; the digit comes out on top."""
        eight, three = constant(self.v16, 8), constant(self.v16, 3)
        odd = self.b.and_(self.b.bitcast(raw, self.v16), constant(self.v16, 0xFF00))
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
            return self.b.trunc(self.b.lshr(product, constant(wide, 16)), self.v16)
        width = "avx512.pmulhu.w.512" if self.v16.count == 32 else "avx2.pmulhu.w"
        return self.call(f"llvm.x86.{width}", self.v16, x, y)

    def dot(self, sums: ir.Value, codes: list[ir.Value], activations: list[ir.Value]) -> ir.Value:
        """Add the products of a byte's quads, four inputs each, to the sums."""
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
            ones = constant(self.v16, 1)
            return self.b.add(sums, self.call("llvm.x86.avx2.pmadd.wd", self.v32, total, ones))
        return self._plain_dot(sums, codes, activations)

    def _plain_dot(
        self, sums: ir.Value, codes: list[ir.Value], activations: list[ir.Value]
    ) -> ir.Value:
        """`dot` without instructions made for it: byte by byte, in int32."""
        for code, activation in zip(codes, activations, strict=True):
            for place in range(PLACES):
                down = constant(self.v32, 8 * place)
                one = self.b.and_(self.b.lshr(code, down), constant(self.v32, 0xFF))
                up = self.b.shl(activation, constant(self.v32, 24 - 8 * place))
                signed = self.b.ashr(up, constant(self.v32, 24))
                sums = self.b.add(sums, self.b.mul(one, signed))
        return sums
