"""Files of tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mhmoe_np.storage.tensors import read_tensors, save_tensors


def test_a_file_may_be_read_by_whom_any_new_file_may(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(2, 3).T
    save_tensors(tmp_path / "x.safetensors", {"x": x})
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    np.testing.assert_array_equal(read_tensors(tmp_path / "x.safetensors")["x"], x)
