"""How this backend's kernels are compiled.

A task works on rows of its own and calls BLAS on one thread (`limit_blas`); `regions` shares tasks out.

No kernel promises the compiler that numbers are finite: code that meets a NaN in spite of such a
promise may do anything, another thing on every processor. Nor did the promise make it faster [D12].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit
from numba.extending import intrinsic, register_jitable

from mhmoe_np.operations.numba_cpu.kernel_cache import keep

Function = TypeVar("Function", bound=Callable[..., Any])

# Fused multiply-adds and multiplication by a reciprocal; the sign of a zero is free. Not `nnan` and
# `ninf`, see above, and not `reassoc`: that would fold away the rounding trick in `exp`.
FAST = {"nsz", "contract", "arcp"}


def task(function: Function) -> Function:
    """A function of one task: branches, loops and calls to BLAS on its own rows."""
    return _compiled(function, fastmath=FAST)


def exact(function: Function) -> Function:
    """A function whose every operation rounds as written: its bits are those of the definition.

    fastmath must be refused, not left out: Numba hands a caller's flags on to a callee that says
    nothing, and caches what it then compiled for all later callers.
    """
    return _compiled(function, fastmath=False)


def reduction(function: Function) -> Function:
    """A sum over a row alone: it vectorises only if the compiler may reorder it."""
    return _compiled(function, fastmath={*FAST, "reassoc"})


def in_turn(function: Function) -> Function:
    """A loop over tasks that Python calls and no compiled code; what it does itself is exact."""
    return _compiled(function, is_entry=True, fastmath=False)


def parallel(function: Function) -> Function:
    """The same on all threads. Keep its body small: it is compiled twice."""
    return _compiled(function, is_entry=True, parallel=True)


def either(function: Function) -> Function:
    """A function for Python and for compiled code."""
    usable: Function = register_jitable(function)
    return usable


def typed_intrinsic(definition: Any) -> Any:
    """Numba's `intrinsic`; the type hints describe the definition and not the call."""
    return intrinsic(definition)


def literal_intrinsic(definition: Any) -> Any:
    """The same, of a definition that wants to know the numbers that stand in the code."""
    return intrinsic(prefer_literal=True)(definition)


def _compiled(function: Function, *, is_entry: bool = False, **options: Any) -> Function:
    options |= {"error_model": "numpy", "no_cfunc_wrapper": True}  # nobody calls them from C
    compiled: Function = njit(**options)(function)
    keep(compiled, is_entry=is_entry)
    return compiled
