"""Which byte dot product this processor has, and forcing another one.

Emitting an instruction that the target lacks ends the process, so the guard asks for every feature by
name and looks at what Numba compiles for (NUMBA_CPU_FEATURES), not at the processor alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

from numba.core import codegen, config

from mhmoe_np.errors import UserError

InstructionSet = Literal["avx512vnni", "avxvnni", "avx2", "portable"]
VARIABLE = "MHMOE_NP_ISA"  # environment: one of the names below

# Fastest first, each with the features it needs.
NEEDS: dict[InstructionSet, set[str]] = {
    "avx512vnni": {"avx512f", "avx512bw", "avx512vnni"},
    "avxvnni": {"avx2", "avxvnni"},
    "avx2": {"avx2"},
    "portable": set(),
}


def features() -> set[str]:
    """What compiled code may use of this processor, in LLVM's words; Numba keeps kernels by them."""
    forced: str | None = vars(config)["CPU_FEATURES"]
    host: Callable[[], str] = codegen.get_host_cpu_features
    listed = host() if forced is None else forced
    return {feature[1:] for feature in listed.split(",") if feature.startswith("+")}


def available() -> list[InstructionSet]:
    """The instruction sets that compiled code may use here, fastest first."""
    present = features()
    return [name for name, needs in NEEDS.items() if needs <= present]


def choose() -> InstructionSet:
    """The fastest one, or the one that the environment variable MHMOE_NP_ISA names.

    Raises UserError: it names none that this processor has.
    """
    usable = available()
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return usable[0]
    for name in usable:
        if name == wanted:
            return name
    raise UserError(f"{VARIABLE}={wanted}: this processor offers {', '.join(usable)}")
