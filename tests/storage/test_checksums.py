"""What a checksum is of, and what it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from mhmoe_np.storage.checksums import PIECE, checksum


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 5])
def test_a_checksum_is_of_all_bytes_of_a_file(size: int, tmp_path: Path) -> None:
    content = (bytes(range(256)) * (size // 256 + 1))[:size]
    path = tmp_path / "file"
    path.write_bytes(content)
    seen: list[int] = []
    assert checksum(path, seen.append) == xxhash.xxh3_128_hexdigest(content)
    assert sum(seen) == size


PEAK = """
import resource
import sys
from pathlib import Path
from mhmoe_np.storage.checksums import checksum
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checksum(Path(sys.argv[1]))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks_in_kilobytes_are_linuxs")
def test_a_large_file_is_not_in_memory_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(16 * PIECE)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 3 * PIECE
