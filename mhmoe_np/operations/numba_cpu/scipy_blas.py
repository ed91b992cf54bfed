"""SciPy's BLAS, by the one extension module in which Numba looks for it.

Importing it by name would import the package around it, `scipy.linalg`: some hundred modules that
nobody here uses, in a third of the time in which a command should answer.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import scipy
from numba.extending import get_cython_function_address

NAME = "scipy.linalg.cython_blas"


def address_of(function: str) -> int:
    """Where a function of SciPy's BLAS begins."""
    if NAME not in sys.modules:
        _import_alone()
    address: int = get_cython_function_address(NAME, function)
    return address


def _import_alone() -> None:
    found = PathFinder.find_spec(NAME, [str(Path(folder) / "linalg") for folder in scipy.__path__])
    if found is None or found.loader is None:
        importlib.import_module(NAME)
        return
    module = sys.modules[NAME] = module_from_spec(found)
    found.loader.exec_module(module)
