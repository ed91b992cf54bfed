"""The BLAS that NumPy's and SciPy's products go to, by name, and those that kernels may choose from."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from mhmoe_np.operations.table import Blas

BlasName = Literal["own", "openblas", "mkl"]
VARIABLE = "MHMOE_NP_BLAS"  # environment: one of these, for compiled kernels


def blas_of(package: Literal["numpy", "scipy"]) -> Blas:
    """The BLAS of a package.

    The library that the package brings says its name, version and architecture itself. Of one that is
    shared with others, as in a distribution, and of any without threadpoolctl, which a source tree may
    lack, this is what the package was built with.
    """
    own = {package, f"{package}.libs"}
    for library in _loaded():
        if own & set(Path(library["filepath"]).parts[-3:-1]):
            return Blas(library["internal_api"], library["version"], library.get("architecture"))
    built = import_module(package).show_config(mode="dicts")["Build Dependencies"]["blas"]
    return Blas(built["name"], built["version"], None)


def _loaded() -> list[dict[str, Any]]:
    """Every BLAS in this process, as threadpoolctl describes it."""
    with suppress(ModuleNotFoundError):
        from threadpoolctl import ThreadpoolController

        found: list[dict[str, Any]] = ThreadpoolController().select(user_api="blas").info()
        return found
    return []
