"""Whether memory is there, and is given back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from mhmoe_np.errors import UserError
from mhmoe_np.storage.memory import check_memory

FREED = """
import psutil
from mhmoe_np.storage.memory import return_free_memory
pieces = [bytes(600) for _ in range(200_000)]
kept = pieces[::100]
del pieces
before = psutil.Process().memory_info().rss
return_free_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_memory_between_pieces_that_are_kept_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50_000_000


def test_what_does_not_fit_is_refused_in_a_line() -> None:
    with pytest.raises(UserError, match=r"^a needs 1,000\.0 GB of memory and .* are free; take less$"):
        check_memory(10**12, "a needs", remedy="take less")
