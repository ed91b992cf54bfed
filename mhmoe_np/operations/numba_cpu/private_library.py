"""Loading shared libraries that need each other, with names that nobody else in the process sees.

Libraries that do not say what they need are meant to be linked to a program; loaded one by one they
find each other only if their names are global, and then every library that is loaded later finds them
too: the MKL that PyTorch holds inside itself would call this one, on one thread and of another version.
So a library without contents is made that needs them all, and what it brings in sees itself alone.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

# Of the ELF format: https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html
SHARED_OBJECT, X86_64, CURRENT = 3, 62, 1
LOAD, DYNAMIC, STACK, READ_WRITE = 1, 2, 0x6474E551, 6
END, NEEDED, HASH, STRINGS, SYMBOLS, STRINGS_BYTES, SYMBOL_BYTES = 0, 1, 4, 5, 6, 10, 11
HEADER, SEGMENT, SYMBOL, ENTRY = "<4s4B8xHHIQQQIHHHHHH", "<IIQQQQQQ", 24, "<qQ"
NO_NAMES = struct.pack("<4I", 1, 1, 0, 0)  # a hash table of the one symbol that every library has
PAGE = 4096


def load_privately(libraries: Sequence[Path]) -> ctypes.CDLL:
    """All of `libraries` as one; its functions are those of the first that has the name.

    Raises OSError: they cannot be loaded, or this is not Linux on x86-64.
    """
    descriptor = os.memfd_create("needs")
    try:
        os.write(descriptor, _needing([os.fsencode(path.resolve()) for path in libraries]))
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=ctypes.RTLD_LOCAL)
    finally:
        os.close(descriptor)


def _needing(names: list[bytes]) -> bytes:
    """A shared library of nothing but the names of others."""
    strings = b"\0" + b"".join(name + b"\0" for name in names)
    symbols = struct.calcsize(HEADER) + 3 * struct.calcsize(SEGMENT)
    hashes = symbols + SYMBOL
    dynamic = hashes + len(NO_NAMES)
    entries = [(NEEDED, strings.index(b"\0" + name + b"\0") + 1) for name in names]
    dynamic_bytes = (len(entries) + 6) * struct.calcsize(ENTRY)
    start = dynamic + dynamic_bytes
    entries += [(HASH, hashes), (STRINGS, start), (SYMBOLS, symbols)]
    entries += [(STRINGS_BYTES, len(strings)), (SYMBOL_BYTES, SYMBOL), (END, 0)]
    total = start + len(strings)
    sizes = struct.calcsize(HEADER), struct.calcsize(SEGMENT), 3, 0, 0, 0
    return b"".join(
        [
            struct.pack(
                *(HEADER, b"\x7fELF", 2, 1, 1, 0, SHARED_OBJECT, X86_64, CURRENT),
                *(0, struct.calcsize(HEADER), 0, 0, *sizes),
            ),
            struct.pack(SEGMENT, LOAD, READ_WRITE, 0, 0, 0, total, total, PAGE),
            struct.pack(SEGMENT, DYNAMIC, READ_WRITE, *(dynamic,) * 3, *(dynamic_bytes,) * 2, 8),
            struct.pack(SEGMENT, STACK, READ_WRITE, 0, 0, 0, 0, 0, 16),
            bytes(SYMBOL),
            NO_NAMES,
            *(struct.pack(ENTRY, *entry) for entry in entries),
            strings,
        ]
    )
