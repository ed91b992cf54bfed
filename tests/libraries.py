"""The package's libraries that its source tree can do without on a machine that only has a GPU.

There the tests that need one are not run; everywhere else all of them are installed.
"""

from __future__ import annotations

import importlib.util

DISPENSABLE = (
    *(
        "gguf",
        "jax",
        "jinja2",
        "latex2mathml",
        "llvmlite",
        "matplotlib",
        "mkdocs",
        "ml_dtypes",
        "numba",
        "psutil",
    ),
    *("rich", "scipy", "threadpoolctl", "tomli_w", "torch", "transformers", "xxhash"),
)


def is_there(name: str) -> bool:
    """Whether a library can be imported; it is not."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


ABSENT = frozenset(name for name in DISPENSABLE if not is_there(name))
"""Those that are not installed."""
