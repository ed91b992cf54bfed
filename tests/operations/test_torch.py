"""PyTorch as a third opinion on what operations compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.operations.bfloat16 import from_bfloat16, to_bfloat16
from tests.operations.cases import BACKENDS, EPS, SEEDS, Inputs, heads, of_each_backend, quick


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).requires_grad_()


def near_torch(actual: Any, expected: torch.Tensor | None) -> None:
    assert expected is not None
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-10, atol=1e-10)


@of_each_backend
def test_rms_norm_and_its_backward_equal_torch(name: str) -> None:
    # [RMSNorm eq. 4], [spec 2 RMSNorm]
    r, ops = Inputs(31, float), BACKENDS[name]
    x, w, dy, dw = r(70, 9), r(9), r(70, 9), r(9)
    before = dw.copy()
    y, rstd = ops.rms_norm(x, w, eps=EPS)
    dx = ops.rms_norm_backward(dy, x, w, rstd, dw)
    torch_x, torch_w = tensor(x), tensor(w)
    torch_y = F.rms_norm(torch_x, (9,), torch_w, eps=EPS)
    torch_y.backward(torch.from_numpy(dy))
    near_torch(y, torch_y)
    near_torch(dx, torch_x.grad)
    near_torch(dw - before, torch_w.grad)


@of_each_backend
@pytest.mark.parametrize(("A", "G"), [(2, 2), (4, 2), (3, 1)])
def test_attention_and_its_backward_equal_torch(name: str, A: int, G: int) -> None:
    # [Attention eq. 1], [spec 2 attention]
    r, ops = Inputs(29, float), BACKENDS[name]
    B, T, C = 2, 67, 6
    q, k, v = r.joint(B, T, A, G, C)
    dout, dqkv = r(B, T, A, C), r(B, T, A + 2 * G, C)
    out, lse = ops.attention(q, k, v)
    ops.attention_backward(dout, q, k, v, out, lse, *heads(dqkv, A, G))

    torch_q, torch_k, torch_v = tensor(q), tensor(k), tensor(v)
    torch_out = F.scaled_dot_product_attention(
        torch_q.transpose(1, 2),
        torch_k.transpose(1, 2).repeat_interleave(A // G, dim=1),
        torch_v.transpose(1, 2).repeat_interleave(A // G, dim=1),
        is_causal=True,
    ).transpose(1, 2)
    torch_out.backward(torch.from_numpy(dout))
    near_torch(out, torch_out)
    for actual, expected in zip(heads(dqkv, A, G), (torch_q, torch_k, torch_v), strict=True):
        near_torch(actual, expected.grad)


@of_each_backend
@pytest.mark.parametrize("T", [1, 5, 65])
def test_attention_of_the_last_positions_equals_torch(name: str, T: int) -> None:
    q, k, v = Inputs(30, float).joint(2, 70, 4, 2, 6)
    q = q[:, 70 - T :]
    visible = torch.ones(T, 70, dtype=torch.bool).tril(70 - T)
    expected = F.scaled_dot_product_attention(
        tensor(q).transpose(1, 2),
        tensor(k).transpose(1, 2).repeat_interleave(2, dim=1),
        tensor(v).transpose(1, 2).repeat_interleave(2, dim=1),
        attn_mask=visible,
    ).transpose(1, 2)
    near_torch(BACKENDS[name].attention(q, k, v)[0], expected)


@of_each_backend
def test_token_nll_and_its_gradient_equal_torch_cross_entropy(name: str) -> None:
    # [spec 4 NLL]
    r, ops = Inputs(33, float), BACKENDS[name]
    x, w, dw, target = r(140, 5), r(530, 5), r(530, 5), r.rng.integers(0, 530, 140)
    target[::4] = -100
    before = dw.copy()
    nll, dx = ops.token_nll_and_gradient(x, w, target, dw, dnll=0.3)
    torch_x, torch_w = tensor(x), tensor(w)
    logits = torch_x @ torch_w.T
    expected = F.cross_entropy(logits, torch.from_numpy(target), reduction="none")
    (0.3 * expected.sum()).backward()
    near_torch(nll, expected)
    near_torch(ops.token_nll(x, w, target), expected)
    near_torch(dx, torch_x.grad)
    near_torch(dw - before, torch_w.grad)


@given(seed=SEEDS, spread=st.sampled_from([1e-30, 1.0, 1e30]))
@quick(20)
def test_bfloat16_weights_round_as_torchs(seed: int, spread: float) -> None:
    w = Inputs(seed, np.float32)(7, 31, spread=spread)
    rounded = torch.from_numpy(w).to(torch.bfloat16)
    assert from_bfloat16(to_bfloat16(w)).tobytes() == rounded.float().numpy().tobytes()
