"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.numpy_ref.sums import added
from mhmoe_np.types import FloatArray


def rms_norm(x_ND: FloatArray, w_D: FloatArray, *, eps: float) -> tuple[FloatArray, FloatArray]:
    """See `Operations.rms_norm`."""
    rstd_N = 1 / np.sqrt(np.mean(x_ND**2, axis=1) + x_ND.dtype.type(eps))
    return x_ND * rstd_N[:, None] * w_D, rstd_N  # RMSNorm eq. 4: x / RMS(x) * g


def add_in_place_and_norm(
    x_ND: FloatArray, branch_ND: FloatArray, w_D: FloatArray, *, eps: float
) -> tuple[FloatArray, FloatArray]:
    """See `Operations.add_in_place_and_norm`."""
    branch_ND += x_ND
    return rms_norm(branch_ND, w_D, eps=eps)


def rms_norm_backward(
    dy_ND: FloatArray,
    x_ND: FloatArray,
    w_D: FloatArray,
    rstd_N: FloatArray,
    dw_D: FloatArray,
    *,
    onto_ND: FloatArray | None = None,
) -> FloatArray:
    """See `Operations.rms_norm_backward`.

    With n = x r and y = n w:  dn = dy w;  dw = sum over rows of dy n.
    r = (mean(x^2) + eps)^(-1/2) gives dr/dx[d] = -r^3 x[d] / D, hence
    dx = r dn - r^3 x mean(dn x) = r (dn - n mean(dn n)).
    """
    n_ND = x_ND * rstd_N[:, None]
    dn_ND = dy_ND * w_D
    dw_D += (dy_ND * n_ND).sum(axis=0)
    dx_ND = rstd_N[:, None] * (dn_ND - n_ND * np.mean(dn_ND * n_ND, axis=1, keepdims=True))
    return added(dx_ND, onto_ND)
