"""Bit rot in a run folder and in packed models is found: `python -m tests.bit_flips` in small."""

from __future__ import annotations

from pathlib import Path

from tests import bit_flips


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    seen, missed = bit_flips.flips(bit_flips.make(tmp_path), count=120, seed=1)
    assert missed == []
    assert sum(seen.values()) == 120
