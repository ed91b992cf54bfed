"""The kernels' sources: what the compiler is given of each `.cu` file. Needs no CuPy."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
REALS = {"float32": "float", "float64": "double"}

# No contraction of a*b + c: where a fused product is wanted a kernel says `fma`. So the same bits come
# out on every device, and on the CPU that emulates one. CuPy itself adds -ftz=true [D17].
OPTIONS = ("--fmad=false", "--std=c++17")


@cache
def source_of(name: str) -> str:
    """`name`.cu with what all kernels share in front, as one text: CuPy's cache sees all of it.

    REAL is defined when it is compiled, as float or double; see `options_of`.
    """
    common, kernels = (
        (FOLDER / file).read_text(encoding="utf-8") for file in ("common.cuh", f"{name}.cu")
    )
    return f'{common}#line 1 "{name}.cu"\n{kernels}'


def options_of(dtype: str) -> tuple[str, ...]:
    """The compiler's options for one float type."""
    return (*OPTIONS, f"-DREAL={REALS[dtype]}", f"-DREAL_IS_DOUBLE={int(dtype == 'float64')}")


def kernel_files() -> list[str]:
    """The names of all `.cu` files, without the ending."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))
