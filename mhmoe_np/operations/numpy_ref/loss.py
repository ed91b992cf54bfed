"""The output head and the negative log-likelihood of the targets."""

from __future__ import annotations

import numpy as np

from mhmoe_np.types import FloatArray, IntArray


def _log_softmax(logits_NV: FloatArray) -> FloatArray:
    """logits - logsumexp(logits), row by row."""
    shifted_NV = logits_NV - logits_NV.max(axis=1, keepdims=True)
    return shifted_NV - np.log(np.exp(shifted_NV).sum(axis=1, keepdims=True))


def _nll(log_p_NV: FloatArray, target_N: IntArray) -> FloatArray:
    """-log p of the target; 0 where there is none."""
    nll_N = -log_p_NV[np.arange(len(target_N)), np.maximum(target_N, 0)]
    return np.where(target_N >= 0, nll_N, log_p_NV.dtype.type(0))


def token_nll(x_ND: FloatArray, w_VD: FloatArray, target_N: IntArray) -> FloatArray:
    """See `Operations.token_nll`."""
    return _nll(_log_softmax(x_ND @ w_VD.T), target_N)


def token_nll_and_gradient(
    x_ND: FloatArray,
    w_VD: FloatArray,
    target_N: IntArray,
    dw_VD: FloatArray,
    *,
    dnll: float,
) -> tuple[FloatArray, FloatArray]:
    """See `Operations.token_nll_and_gradient`.

    nll = logsumexp(l) - l[target], hence dl = dnll (softmax(l) - onehot(target)); 0 where uncounted.
    dx = dl @ w;  dw = dl^T @ x.
    """
    log_p_NV = _log_softmax(x_ND @ w_VD.T)
    dlogits_NV = np.exp(log_p_NV)
    dlogits_NV[np.arange(len(target_N)), np.maximum(target_N, 0)] -= 1
    dlogits_NV *= ((target_N >= 0) * x_ND.dtype.type(dnll))[:, None]
    dw_VD += dlogits_NV.T @ x_ND
    return _nll(log_p_NV, target_N), dlogits_NV @ w_VD
