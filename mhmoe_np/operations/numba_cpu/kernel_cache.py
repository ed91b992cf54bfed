"""Where compiled kernels are kept: in a folder that is named by the sources they were compiled from.

Numba keeps a function by the file it stands in, and does not notice that one it calls in another file
has changed. So the folder's name holds a digest of every source that can be part of a kernel. What is
compiled from other sources lies in other folders; those that nobody has used for a month go when a new
one is made.

The folder is made in NUMBA_CACHE_DIR if that is set, else beside the sources if one may write there,
else in the user's own cache.

A kernel that is kept is loaded without the compiler, which takes half a second to be made ready [D27].
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numba
from llvmlite.binding import parse_assembly
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.runtime.nrt import rtsys
from numba.misc import appdirs

HERE = Path(__file__).parent
BESIDE = ("bfloat16.py", "int8.py", "packing.py", "table.py")  # what kernels know of the folder above
PREFIX = "mhmoe-np-kernels-"
KEPT_SECONDS = 30 * 24 * 3600


config: Any = numba.config


def digest() -> str:
    """Of all sources that can be part of a kernel."""
    total = hashlib.sha256()
    for path in [*sorted(HERE.glob("*.py")), *(HERE.parent / name for name in BESIDE)]:
        source = path.read_bytes()
        total.update(f"{path.name} {len(source)}\n".encode() + source)
    return total.hexdigest()[:16]


def _root() -> Path:
    if config.CACHE_DIR:
        return Path(config.CACHE_DIR)
    beside = HERE / "__pycache__"
    with contextlib.suppress(OSError):
        beside.mkdir(exist_ok=True)
    if os.access(beside, os.W_OK):
        return beside
    return Path(appdirs.user_cache_dir("mhmoe-np", appauthor=False))  # type: ignore[no-untyped-call]


def _folder() -> Path:
    """This version's folder, marked as used today; without those that nobody uses any more."""
    folder = ROOT / f"{PREFIX}{digest()}"
    with contextlib.suppress(OSError):  # Numba says what is wrong
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            for other in ROOT.glob(f"{PREFIX}*"):
                if other.stat().st_mtime < time.time() - KEPT_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)
        os.utime(folder)
    return folder


ROOT = _root()
FOLDER = _folder()


class _KernelCache(FunctionCache):
    """Numba's cache of one function, which readies for what it loads and not for a compilation.

    Numba's own first imports and registers all that it can compile, for third parties that run code
    of their own on that occasion. Whoever finds nothing kept and compiles does so in any case.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What is kept of a function for a signature; None: nothing is, or it is damaged."""
        rtsys.initialize(target_context)  # kernels count references by its functions
        try:
            with self._guard_against_spurious_io_errors():
                return self._load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except (EOFError, UnpicklingError):  # written before a power failure: compiled anew
            self.flush()  # type: ignore[no-untyped-call]
            return None


class _MachineCode(CompileResultCacheImpl):
    """What is kept of a function that Python alone calls: nothing to compile others with.

    That takes as long to read as the machine code. Numba asks it for the function's name alone.
    """

    def reduce(self, compiled: Any) -> tuple[Any, ...]:
        """What is written of a compiled function."""
        reduced = super().reduce(compiled)  # type: ignore[no-untyped-call]
        (name, kind, (machine_code, _)), *others = reduced
        known = f'@"{compiled.fndesc.llvm_cpython_wrapper_name}" = constant i8 0'
        return (name, kind, (machine_code, parse_assembly(known).as_bitcode())), *others


class _EntryCache(_KernelCache):
    _impl_class = _MachineCode  # type: ignore[assignment]


def keep(compiled: Any, *, is_entry: bool = False) -> None:
    """Let the machine code of a Numba dispatcher or callback be kept in `FOLDER`.

    is_entry: Python alone calls it, and no compiled code.
    """
    before, config.CACHE_DIR = config.CACHE_DIR, str(FOLDER)
    try:
        cache: Any = _EntryCache if is_entry else _KernelCache
        compiled._cache = cache(compiled.__wrapped__)
    finally:
        config.CACHE_DIR = before
