"""PyTorch as a third opinion on what operations compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).requires_grad_()


def near_torch(actual: Any, expected: torch.Tensor | None) -> None:
    assert expected is not None
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-10, atol=1e-10)
