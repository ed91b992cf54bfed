"""Every backward of both backends is the derivative of its own forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mhmoe_np.operations.table import Operations
from tests.operations.cases import ACTIVATIONS, BACKENDS, Inputs, heads, router_losses

EPS = 1e-5
STEP = 2e-4  # error of the stencil h^4 f^(5)/30 ~ 1e-15, of its rounding 1e-16/h ~ 1e-12
RELATIVE = 1e-7
DIRECTIONS = 3

Arrays = dict[str, Any]


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Operations:
    return BACKENDS[request.param]


def along(loss: Callable[[Arrays], float], at: Mapping[str, Any], name: str, direction: Any) -> float:
    """The derivative of the loss as one input moves, by the central stencil of fourth order."""

    def moved(steps: int) -> float:
        return loss({**at, name: at[name] + steps * STEP * direction})

    return (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * STEP)


def check(
    loss: Callable[[Arrays], float], at: Mapping[str, Any], gradients: Mapping[str, Any], seed: int
) -> None:
    """Each input's gradient, along random directions."""
    rng = np.random.default_rng(seed)
    for name, gradient in gradients.items():
        assert gradient.shape == at[name].shape
        for _ in range(DIRECTIONS):
            direction = rng.standard_normal(gradient.shape)
            expected = along(loss, at, name, direction)
            actual = float((gradient * direction).sum())
            assert actual == pytest.approx(expected, rel=RELATIVE, abs=0), name


class Accumulators:
    """Non-zero arrays for a backward to add to, and what it has added."""

    def __init__(self, r: Inputs, **like: Any) -> None:
        self.before = {name: None if array is None else r(*array.shape) for name, array in like.items()}
        self.arrays = {
            name: None if array is None else array.copy() for name, array in self.before.items()
        }

    def __iter__(self) -> Any:
        return iter(self.arrays.values())

    def added(self) -> Arrays:
        return {
            name: array - self.before[name] for name, array in self.arrays.items() if array is not None
        }


def away_from_zero(x: Any) -> Any:
    """Moved off the kink of relu2, farther than the stencil reaches."""
    return x + np.sign(x) * 0.01


@pytest.mark.parametrize("bias", [True, False])
def test_linear_backward_is_the_derivative(ops: Operations, bias: bool) -> None:
    # [spec 1 x @ W.T]
    r = Inputs(20, float)
    at = {"x": r(7, 5), "w": r(3, 5), "b": r(3) if bias else None}
    dy = r(7, 3)
    sums = Accumulators(r, w=at["w"], b=at["b"])
    dx = ops.linear_backward(dy, at["x"], at["w"], *sums)

    def loss(i: Arrays) -> float:
        return float((dy * ops.linear(i["x"], i["w"], i["b"])).sum())

    check(loss, at, {"x": dx, **sums.added()}, seed=120)


def test_embedding_backward_is_the_derivative(ops: Operations) -> None:
    r = Inputs(21, float)
    ids, dx = r.rng.integers(0, 4, 9), r(9, 3)
    at = {"w": r(5, 3)}
    sums = Accumulators(r, w=at["w"])
    ops.embedding_backward(dx, ids, *sums)
    check(lambda i: float((dx * ops.embedding(ids, i["w"])).sum()), at, sums.added(), seed=121)


def test_rms_norm_backward_is_the_derivative(ops: Operations) -> None:
    r = Inputs(22, float)
    at = {"x": r(70, 5), "w": r(5)}
    dy = r(70, 5)
    sums = Accumulators(r, w=at["w"])
    _, rstd = ops.rms_norm(at["x"], at["w"], eps=EPS)
    dx = ops.rms_norm_backward(dy, at["x"], at["w"], rstd, *sums)

    def loss(i: Arrays) -> float:
        return float((dy * ops.rms_norm(i["x"], i["w"], eps=EPS)[0]).sum())

    check(loss, at, {"x": dx, **sums.added()}, seed=122)


def test_the_opposite_rotation_is_the_derivative_of_a_rotation(ops: Operations) -> None:
    r = Inputs(23, float)
    at, dy, angle = {"x": r(2, 5, 3, 4)}, r(2, 5, 3, 4), r(5, 2)
    cos, sin = np.cos(angle), np.sin(angle)

    def loss(i: Arrays) -> float:
        y = i["x"].copy()
        ops.rotate_in_place(y, cos, sin)
        return float((dy * y).sum())

    dx = dy.copy()
    ops.rotate_in_place(dx, cos, -sin)
    check(loss, at, {"x": dx}, seed=123)


@pytest.mark.parametrize(("A", "G"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("T", [1, 6, 66])
def test_attention_backward_is_the_derivative(ops: Operations, T: int, A: int, G: int) -> None:
    r = Inputs(24, float)
    at = {"qkv": r(2, T, A + 2 * G, 4)}
    dout = r(2, T, A, 4)
    q, k, v = heads(at["qkv"], A, G)
    dqkv = r(*at["qkv"].shape)
    ops.attention_backward(dout, q, k, v, *ops.attention(q, k, v), *heads(dqkv, A, G))

    def loss(i: Arrays) -> float:
        return float((dout * ops.attention(*heads(i["qkv"], A, G))[0]).sum())

    check(loss, at, {"qkv": dqkv}, seed=124)
    # Along each part alone too: that of v could drown those of q and k.
    for part in range(3):
        mask = np.zeros_like(dqkv)
        heads(mask, A, G)[part][...] = 1
        direction = np.random.default_rng(part).standard_normal(mask.shape) * mask
        expected, actual = along(loss, at, "qkv", direction), float((dqkv * direction).sum())
        # The only position of T = 1 sees itself alone: q and k have no effect at all, up to
        # rounding divided by STEP.
        absolute = 1e-10 if T == 1 and part < 2 else 0
        assert actual == pytest.approx(expected, rel=RELATIVE, abs=absolute)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_backward_is_the_derivative(ops: Operations, activation: Any) -> None:
    # [GLU eq. 5], [spec 2 FFN]
    r = Inputs(25, float)
    at, dh = {"gate_up": away_from_zero(r(70, 10))}, r(70, 5)
    gradient = ops.gated_activation_backward(dh, at["gate_up"], activation=activation)

    def loss(i: Arrays) -> float:
        return float((dh * ops.gated_activation(i["gate_up"], activation=activation)).sum())

    check(loss, at, {"gate_up": gradient}, seed=125)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("E", "K"), [(5, 2), (4, 4), (6, 1)])
def test_route_backward_is_the_derivative_where_the_choice_holds(
    ops: Operations, E: int, K: int, normalise: bool
) -> None:
    # [spec 3 softmax], [Switch eq. 4], [spec 4 aux], [ST-MoE eq. 5], [spec 4 z-loss]
    r = Inputs(26, float)
    M = 9
    # Well apart, in a random order: no move of the stencil changes the choice.
    apart = np.stack([r.rng.permutation(E) for _ in range(M)]) * 0.5
    at = {"logits": apart + r.rng.uniform(-0.2, 0.2, (M, E))}
    dgate, counted = r(M, K), r.rng.random(M) < 0.6
    assert 0 < counted.sum() < M
    losses = router_losses(r, E, counted)
    routing = ops.route(at["logits"], top_k=K, normalise=normalise)
    gradient = ops.route_backward(dgate, routing, counted, losses, normalise=normalise)

    def loss(i: Arrays) -> float:
        now = ops.route(i["logits"], top_k=K, normalise=normalise)
        assert (now.expert_MK == routing.expert_MK).all()
        share_E = losses.count_E / losses.choices
        aux = E * (share_E * now.p_ME[counted].mean(axis=0)).sum()
        z = (now.log_sum_exp_M[counted] ** 2).mean()
        return float((dgate * now.gate_MK).sum() + losses.daux * aux + losses.dz * z)

    check(loss, at, {"logits": gradient}, seed=126)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sub_norm", [True, False])
@pytest.mark.parametrize("capacity", [None, 3])
def test_expert_ffn_backward_is_the_derivative(
    ops: Operations, activation: Any, sub_norm: bool, capacity: int | None
) -> None:
    # [P1 eq. 3], [spec 3 Expert]
    r = Inputs(43, float)
    M, E, K, U, F_ = 6, 4, 2, 3, 5
    sent = ops.dispatch(r.experts(M, E, K, "one"), experts=E, capacity=capacity)
    at = {
        "x": r(M, U),
        "gate": r(M, K),
        "gate_up": r(E, 2 * F_, U),
        "down": r(E, U, F_),
        "sub_norm": r(E, F_) if sub_norm else None,
    }
    dy = r(M, U)

    def forward(i: Arrays) -> Any:
        weights = (i["gate_up"], i["down"], i["sub_norm"])
        return ops.expert_ffn(i["x"], i["gate"], sent, *weights, activation=activation, eps=EPS)

    _, cache = forward(at)
    positive = cache.gate_up_R2F[:, :F_] > 0

    def loss(i: Arrays) -> float:
        y, now = forward(i)
        # relu2's second derivative jumps at zero, which the stencil must not cross.
        assert ((now.gate_up_R2F[:, :F_] > 0) == positive).all()
        return float((dy * y).sum())

    sums = Accumulators(r, gate_up=at["gate_up"], down=at["down"], sub_norm=at["sub_norm"])
    weights = (at["gate_up"], at["down"], at["sub_norm"])
    dx, dgate = ops.expert_ffn_backward(
        dy, at["x"], at["gate"], sent, *weights, cache, *sums, activation=activation
    )
    assert (sent.slot_MK < 0).any() == (capacity is not None)
    assert (dgate[sent.slot_MK < 0] == 0).all()
    check(loss, at, {"x": dx, "gate": dgate, **sums.added()}, seed=127)


@pytest.mark.parametrize("dnll", [1.0, 0.37])
def test_token_nll_and_gradient_returns_the_derivative(ops: Operations, dnll: float) -> None:
    r = Inputs(28, float)
    at = {"x": r(8, 4), "w": r(11, 4)}
    target = r.rng.integers(0, 11, 8)
    target[[1, 5]] = -100
    sums = Accumulators(r, w=at["w"])
    _, dx = ops.token_nll_and_gradient(at["x"], at["w"], target, *sums, dnll=dnll)
    check(
        lambda i: dnll * float(ops.token_nll(i["x"], i["w"], target).sum()),
        at,
        {"x": dx, **sums.added()},
        seed=128,
    )


# ---- against torch ---------------------------------------------------------------------------


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).requires_grad_()


def near(actual: Any, expected: torch.Tensor | None) -> None:
    assert expected is not None
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("A", "G"), [(2, 2), (4, 2), (3, 1)])
def test_attention_and_its_backward_equal_torch(ops: Operations, A: int, G: int) -> None:
    # [Attention eq. 1], [spec 2 attention]
    r = Inputs(29, float)
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
    near(out, torch_out)
    for actual, expected in zip(heads(dqkv, A, G), (torch_q, torch_k, torch_v), strict=True):
        near(actual, expected.grad)


@pytest.mark.parametrize("T", [1, 5, 65])
def test_attention_of_the_last_positions_equals_torch(ops: Operations, T: int) -> None:
    q, k, v = Inputs(30, float).joint(2, 70, 4, 2, 6)
    q = q[:, 70 - T :]
    visible = torch.ones(T, 70, dtype=torch.bool).tril(70 - T)
    expected = F.scaled_dot_product_attention(
        tensor(q).transpose(1, 2),
        tensor(k).transpose(1, 2).repeat_interleave(2, dim=1),
        tensor(v).transpose(1, 2).repeat_interleave(2, dim=1),
        attn_mask=visible,
    ).transpose(1, 2)
    near(ops.attention(q, k, v)[0], expected)


def test_rms_norm_and_its_backward_equal_torch(ops: Operations) -> None:
    # [RMSNorm eq. 4], [spec 2 RMSNorm]
    r = Inputs(31, float)
    x, w, dy, dw = r(70, 9), r(9), r(70, 9), r(9)
    before = dw.copy()
    y, rstd = ops.rms_norm(x, w, eps=EPS)
    dx = ops.rms_norm_backward(dy, x, w, rstd, dw)
    torch_x, torch_w = tensor(x), tensor(w)
    torch_y = F.rms_norm(torch_x, (9,), torch_w, eps=EPS)
    torch_y.backward(torch.from_numpy(dy))
    near(y, torch_y)
    near(dx, torch_x.grad)
    near(dw - before, torch_w.grad)


def test_token_nll_and_its_gradient_equal_torch_cross_entropy(ops: Operations) -> None:
    # [spec 4 NLL]
    r = Inputs(33, float)
    x, w, dw, target = r(140, 5), r(530, 5), r(530, 5), r.rng.integers(0, 530, 140)
    target[::4] = -100
    before = dw.copy()
    nll, dx = ops.token_nll_and_gradient(x, w, target, dw, dnll=0.3)
    torch_x, torch_w = tensor(x), tensor(w)
    logits = torch_x @ torch_w.T
    expected = F.cross_entropy(logits, torch.from_numpy(target), reduction="none")
    (0.3 * expected.sum()).backward()
    near(nll, expected)
    near(ops.token_nll(x, w, target), expected)
    near(dx, torch_x.grad)
    near(dw - before, torch_w.grad)
