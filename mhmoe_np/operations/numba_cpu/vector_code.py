"""Vector code in LLVM's terms that all innermost loops share: loads, broadcasts, loops."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def constant(kind: ir.VectorType, value: int) -> ir.Constant:
    """A vector with one value in every lane."""
    return ir.Constant(kind, [value] * kind.count)


class VectorCode:
    """Emits vector code into `builder`: what the loops of all kinds of numbers share."""

    def __init__(self, builder: ir.IRBuilder, lanes: int) -> None:
        self.b, self.lanes = builder, lanes

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
        """One number in every lane."""
        undefined = ir.Constant(ir.VectorType(value.type, self.lanes), ir.Undefined)
        one = self.b.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, undefined, constant(ir.VectorType(I32, self.lanes), 0))

    def loop(
        self,
        first: ir.Value,
        end: ir.Value,
        step: int,
        sums: list[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
    ) -> tuple[ir.Value, list[ir.Value]]:
        """While `step` more groups fit before `end`: sums = body(group, sums). Return both at last."""
        b = self.b
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
