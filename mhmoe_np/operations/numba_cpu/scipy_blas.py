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
from types import ModuleType

import scipy

NAME = "scipy.linalg.cython_blas"


def _extension() -> ModuleType:
    found = PathFinder.find_spec(NAME, [str(Path(folder) / "linalg") for folder in scipy.__path__])
    if NAME in sys.modules or found is None or found.loader is None:
        return importlib.import_module(NAME)
    module = sys.modules[NAME] = module_from_spec(found)
    found.loader.exec_module(module)
    return module


cython_blas = _extension()
