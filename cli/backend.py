"""The options that choose a backend, and loading it with a word about compilation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import click

from mhmoe_cli.progress import progress, tell
from mhmoe_np.operations.cuda.driver import check_driver
from mhmoe_np.operations.load import import_numba_backend, load_operations
from mhmoe_np.operations.table import BackendName, Operations

Command = TypeVar("Command", bound=Callable[..., Any])


def backend_option(command: Command) -> Command:
    """`--backend numpy|numba|cuda`."""
    return click.option(
        "--backend",
        type=click.Choice(["numpy", "numba", "cuda"]),
        default="numba",
        show_default=True,
        help="numba: fast; numpy: the definition; cuda: an NVIDIA GPU.",
    )(command)


def _meant(
    _context: click.Context, _option: click.Parameter, name: Literal["both"] | BackendName
) -> list[BackendName]:
    return ["numpy", "numba"] if name == "both" else [name]


def backends_option(command: Command) -> Command:
    """`--backend both|numpy|numba|cuda`, as the list of those that are meant."""
    return click.option(
        "--backend",
        "backends",
        type=click.Choice(["both", "numpy", "numba", "cuda"]),
        default="both",
        show_default=True,
        callback=_meant,
        help="both: numpy and numba.",
    )(command)


def threads_option(command: Command) -> Command:
    """`--threads N`."""
    return click.option(
        "--threads", type=click.IntRange(min=1), help="Threads to use (default: one for each core)."
    )(command)


def announce_compilation() -> None:
    """Say so on standard error, once, if kernels must be compiled first.

    Raises UserError: the environment has settings of Numba's that it cannot work with.
    """
    with progress() as show:
        show("loading Numba", 0, 0)
        with _objects_that_stay():
            import_numba_backend()
    from mhmoe_np.operations.numba_cpu.notice import on_first_compilation

    on_first_compilation(lambda: tell("compiling kernels, kept for later runs (a minute or so) ..."))


@contextmanager
def _objects_that_stay() -> Iterator[None]:
    """Nothing that is made meanwhile is looked at again for garbage.

    Numba is some hundred thousand objects. To go through them while it is imported takes a tenth of a
    command's start, and once more at the end half a second.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def prepare(name: BackendName) -> None:
    """What can be said at once of a backend that is loaded later: its GPU is missing, or it compiles.

    Raises UserError: there is no such GPU, or the environment is unfit for Numba.
    """
    if name == "numba":
        announce_compilation()
    if name == "cuda":
        check_driver()


def load(name: BackendName, *, threads: int | None = None, keep_buffers: bool = False) -> Operations:
    """The backend; says so on standard error if its kernels must be compiled first.

    Raises UserError: as `load_operations`.
    """
    prepare(name)
    return load_operations(name, threads=threads, keep_buffers=keep_buffers)
