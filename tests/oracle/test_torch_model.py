"""The oracle checked by itself: hand examples and properties, without the implementation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from . import torch_model as oracle

SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 6,
}
MOE = SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
MULTI_HEAD = MOE | {"moe_heads": 2}
EVERYTHING = MULTI_HEAD | {
    "num_key_value_heads": 1,
    "head_dim": 6,
    "moe_projection_bias": True,
    "shared_expert_intermediate_size": 3,
    "moe_capacity_factor": 0.75,
    "router_aux_loss_type": "topk",
    "router_z_loss_coef": 0.1,
    "use_sub_norm": True,
    "hidden_act": "relu2",
    "tie_word_embeddings": False,
}
TOKENS = np.array([[1, 5, 2, 9, 4, 7], [3, 3, 8, 0, 10, 6]])


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = oracle.expected_shapes(oracle.read_config(config))
    weights = {name: 0.5 * random.standard_normal(shape) for name, shape in shapes.items()}
    for name in weights:
        if "norm" in name:
            weights[name] += 1
    return weights


def run(config: dict[str, Any], weights: dict[str, np.ndarray], tokens: np.ndarray = TOKENS):
    return oracle.trace(config, weights, tokens, gradients=False)


# --------------------------------------------------------------------------------- backbone


def test_dense_model_by_hand():
    """One layer, D = 2, one head, two positions, every step in scalars.

    q, k, v, o and up are identities, gate and down read one feature each, norms are 1.
    """
    config = {
        "vocab_size": 3,
        "hidden_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 2,
        "rms_norm_eps": 0.5,
    }
    weights = {name: np.eye(2) for name in oracle.expected_shapes(oracle.read_config(config))}
    for name in weights:
        if "norm" in name:
            weights[name] = np.ones(2)
    weights["model.embed_tokens.weight"] = np.array([[1.0, 0.0], [1.0, 2.0], [-1.0, 1.0]])
    weights["model.layers.0.mlp.gate_proj.weight"] = np.array([[0.0, 1.0], [1.0, 0.0]])

    def norm(a: float, b: float) -> tuple[float, float]:
        size = math.sqrt((a * a + b * b) / 2 + 0.5)
        return a / size, b / size

    def feed(a: float, b: float) -> tuple[float, float]:
        a_, b_ = norm(a, b)
        silu_a, silu_b = a_ / (1 + math.exp(-a_)), b_ / (1 + math.exp(-b_))
        return a + silu_b * a_, b + silu_a * b_  # the gates are crossed

    # Position 0: norm(1, 0) = (1, 0); attention returns its own value.
    assert norm(1, 0) == (1, 0)
    h0 = feed(1 + 1, 0 + 0)
    # Position 1: norm(1, 2) = (c, 2c), rotated by one radian against position 0 (not rotated).
    c = 1 / math.sqrt(3)
    own_score = (c * c + 4 * c * c) / math.sqrt(2)
    past_score = (c * math.cos(1) - 2 * c * math.sin(1)) / math.sqrt(2)
    past = 1 / (1 + math.exp(own_score - past_score))
    h1 = feed(1 + past * 1 + (1 - past) * c, 2 + (1 - past) * 2 * c)

    result = run(config, weights, np.array([[0, 1, 2]]))
    np.testing.assert_allclose(result["layers.0.hidden"][0], [h0, h1], rtol=1e-13)
    logits = []
    for a, b in (norm(*h0), norm(*h1)):
        logits.append([a, a + 2 * b, b - a])
    np.testing.assert_allclose(result["logits"][0], logits, rtol=1e-13)
    loss = [math.log(sum(map(math.exp, row))) for row in logits]
    nll = (loss[0] - logits[0][1] + loss[1] - logits[1][2]) / 2
    assert result["nll"].shape == ()
    assert result["nll"] == pytest.approx(nll, rel=1e-13)
    assert result["loss"] == result["nll"]
    assert result["aux_loss"] == 0
    assert result["z_loss"] == 0


def test_rope_pairs_the_halves_and_keeps_relative_positions():
    x = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    x[..., 1] = 1  # feature 1 pairs with feature 3, at frequency 100^(-1/2)
    rotated = oracle.rotate(x, theta=100.0)[0, :, 0]
    expected = [[0, math.cos(0.1 * t), 0, math.sin(0.1 * t)] for t in range(3)]
    np.testing.assert_allclose(rotated.numpy(), expected, atol=1e-15)


def test_grouped_query_attention_repeats_key_value_heads():
    grouped = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2}
    weights = random_weights(grouped)
    repeated = dict(weights)
    for name, array in weights.items():
        if "k_proj" in name or "v_proj" in name:
            first, second = array[:2], array[2:]
            repeated[name] = np.concatenate([first, first, second, second])
    plain = grouped | {"num_key_value_heads": 4}
    np.testing.assert_allclose(
        run(grouped, weights)["logits"], run(plain, repeated)["logits"], rtol=1e-12
    )


def test_head_dim_sets_the_scale_of_the_scores():
    """Heads of width 2, spread over features 0 and 2 of width 4, with √(4/2) put into q.

    Both widths turn their first pair at frequency 1, and the first pair of width 4 is (0, 2).
    """
    narrow = SMALL | {"head_dim": 2}
    weights = random_weights(narrow)
    wide = dict(weights)
    spread = np.kron(np.eye(2), np.eye(4)[:, [0, 2]])  # [A·4, A·2]
    for name, array in weights.items():
        if "q_proj" in name:
            wide[name] = math.sqrt(2) * spread @ array
        elif "k_proj" in name or "v_proj" in name:
            wide[name] = spread @ array
        elif "o_proj" in name:
            wide[name] = array @ spread.T
    np.testing.assert_allclose(
        run(narrow, weights)["logits"], run(SMALL | {"head_dim": 4}, wide)["logits"], rtol=1e-12
    )


@pytest.mark.parametrize(
    ("act", "expected"), [("silu", [6 / (1 + math.exp(-2)), -6 / (1 + math.e)]), ("relu2", [12, 0])]
)
def test_activations(act, expected):
    config = oracle.read_config(SMALL | {"hidden_act": act})
    eye = torch.eye(2, dtype=torch.float64)
    gate = torch.tensor([[2.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    up = torch.tensor([[3.0, 0.0], [0.0, 6.0]], dtype=torch.float64)
    weights = {"f.gate_proj.weight": gate, "f.up_proj.weight": up, "f.down_proj.weight": eye}
    y = oracle.ffn(config, weights, "f", torch.ones(1, 2, dtype=torch.float64))
    np.testing.assert_allclose(y.numpy(), [expected], rtol=1e-14)


@pytest.mark.parametrize("config", [SMALL, MULTI_HEAD, MULTI_HEAD | {"quantization": "bitnet"}])
def test_logits_depend_only_on_the_past(config):
    weights = random_weights(config)
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % config["vocab_size"]
    before, after = run(config, weights)["logits"], run(config, weights, changed)["logits"]
    np.testing.assert_allclose(before[:, :3], after[:, :3], rtol=1e-12)
    assert np.all(np.abs(before[:, 3:] - after[:, 3:]).max(axis=-1) > 0)


def test_padding_changes_nothing_that_is_scored():
    config = MULTI_HEAD | {"router_z_loss_coef": 0.1}
    weights = random_weights(config)
    short = TOKENS[:1, :4]
    padded = np.concatenate([short, np.full((1, 2), -100)], axis=1)
    a = oracle.trace(config, weights, short)
    b = oracle.trace(config, weights, padded)
    for name in a:
        if name.startswith(("grad.", "nll", "aux", "z_loss", "loss")):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(a["logits"], b["logits"][:, :3], rtol=1e-12)
    np.testing.assert_array_equal(b["input_ids"], padded[:, :-1])
    np.testing.assert_array_equal(b["target_ids"], padded[:, 1:])


def test_padding_still_takes_capacity():
    """One expert, 20 sub-tokens, ⌈0.5·20⌉ = 10 places: the first row takes them all, padded or not.

    Dropless, the second row would get the expert's output; here it gets what a zero expert gives.
    """
    config = MULTI_HEAD | {"num_experts": 1, "num_experts_per_tok": 1}
    weights = random_weights(config)
    zero_expert = {"model.layers.1.mlp.experts.0.down_proj.weight": np.zeros((4, 5))}
    tokens = TOKENS.copy()
    tokens[0, 2:] = -100
    tight = run(config | {"moe_capacity_factor": 0.5}, weights, tokens)["logits"]
    dropless = run(config, weights, tokens)["logits"]
    zero = run(config, weights | zero_expert, tokens)["logits"]
    np.testing.assert_allclose(tight[0], dropless[0], rtol=1e-12)
    np.testing.assert_allclose(tight[1], zero[1], rtol=1e-12)
    assert not np.allclose(dropless[1], zero[1])


# -------------------------------------------------------------------------------------- MoE


@pytest.mark.parametrize("sub_norm", [False, True])
def test_identical_experts_are_a_dense_ffn(sub_norm):
    config = MOE | {"moe_intermediate_size": 6, "decoder_sparse_step": 1, "use_sub_norm": sub_norm}
    dense = SMALL | {"use_sub_norm": sub_norm}
    dense_weights = random_weights(dense)
    weights = random_weights(config)
    for name in weights:
        before, _, after = name.partition(".experts.")
        source = f"{before}.{after[2:]}" if after else name
        if source in dense_weights:
            weights[name] = dense_weights[source]
    np.testing.assert_allclose(
        run(config, weights)["logits"], run(dense, dense_weights)["logits"], rtol=1e-12
    )


def block_diagonal(block: np.ndarray) -> np.ndarray:
    return np.kron(np.eye(2), block)


def test_two_heads_of_one_expert_are_a_block_diagonal_ffn():
    config = MULTI_HEAD | {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 3}
    dense = SMALL
    weights = random_weights(config)
    wide = {name: array for name, array in weights.items() if ".layers.1.mlp." not in name}
    head = weights["model.layers.1.mlp.head_proj.weight"]
    merge = weights["model.layers.1.mlp.merge_proj.weight"]
    expert = {
        part: block_diagonal(weights[f"model.layers.1.mlp.experts.0.{part}_proj.weight"])
        for part in ("gate", "up", "down")
    }
    wide["model.layers.1.mlp.gate_proj.weight"] = expert["gate"] @ head
    wide["model.layers.1.mlp.up_proj.weight"] = expert["up"] @ head
    wide["model.layers.1.mlp.down_proj.weight"] = merge @ expert["down"]
    np.testing.assert_allclose(run(config, weights)["logits"], run(dense, wide)["logits"], rtol=1e-12)


def test_sub_tokens_are_token_major():
    """With the identity as router, the logits show which features each row n·H + j holds."""
    config = MULTI_HEAD | {"moe_head_layer": False, "moe_merge_layer": False}
    weights = {name: torch.from_numpy(w) for name, w in random_weights(config).items()}
    weights["model.layers.1.mlp.gate.weight"] = torch.eye(4, dtype=torch.float64)
    x = torch.arange(24, dtype=torch.float64).reshape(3, 8)
    _, routing = oracle.moe(oracle.read_config(config), weights, "model.layers.1.mlp", x)
    assert routing.logits.tolist() == [list(range(4 * row, 4 * row + 4)) for row in range(6)]


@pytest.mark.parametrize("moe_heads", [1, 2])
def test_identity_projections_can_be_left_out(moe_heads):
    config = MOE | {"moe_heads": moe_heads, "moe_head_layer": True, "moe_merge_layer": True}
    config |= {"moe_projection_bias": True}
    weights = random_weights(config)
    for name in weights:
        if "head_proj" in name or "merge_proj" in name:
            weights[name] = np.eye(8) if name.endswith("weight") else np.zeros(8)
    bare = {k: v for k, v in weights.items() if "head_proj" not in k and "merge_proj" not in k}
    np.testing.assert_allclose(
        run(config, weights)["logits"],
        run(config | {"moe_head_layer": False, "moe_merge_layer": False}, bare)["logits"],
        rtol=1e-12,
    )


def test_shared_expert_is_added_at_token_level():
    """With every routed expert and the merge layer at zero, the layer is its shared expert."""
    config = MULTI_HEAD | {"shared_expert_intermediate_size": 6}
    weights = random_weights(config)
    weights["model.layers.1.mlp.merge_proj.weight"] = np.zeros((8, 8))
    dense = {
        name.replace(".shared_expert", ""): array
        for name, array in weights.items()
        if ".layers.1.mlp." not in name or ".shared_expert." in name
    }
    np.testing.assert_allclose(run(config, weights)["logits"], run(SMALL, dense)["logits"], rtol=1e-12)


def test_ties_go_to_the_lower_expert_and_gates_may_stay_raw():
    router = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    x = torch.ones(1, 1)
    for norm, total in ((True, 1.0), (False, 2 * math.e / (1 + 3 * math.e))):
        config = oracle.read_config(MOE | {"norm_topk_prob": norm})
        routing = oracle.route(config, router, x)
        assert routing.experts.tolist() == [[1, 2]]
        assert float(routing.gates.sum()) == pytest.approx(total)


def test_ties_of_many_experts_keep_their_order():
    config = oracle.read_config(MOE | {"num_experts": 96, "num_experts_per_tok": 40})
    routing = oracle.route(config, torch.zeros(96, 1), torch.ones(5, 1))
    assert routing.experts.tolist() == [list(range(40))] * 5


def test_capacity_number():
    assert oracle.capacity(1.0, K=1, M=8, E=4) == 2
    assert oracle.capacity(1.25, K=2, M=10, E=4) == 8  # ⌈1.25·2·3⌉ = ⌈7.5⌉
    assert oracle.capacity(0.01, K=1, M=4, E=4) == 1


def test_capacity_is_filled_by_first_choices_first():
    experts = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]])
    # Each expert takes its two first choices, then the earlier of its two second choices.
    kept = oracle.within_capacity(experts, E=2, limit=3)
    assert kept.tolist() == [[True, True], [True, False], [True, True], [True, False]]
    # A late first choice goes before an early second choice.
    experts = torch.tensor([[0, 1], [1, 0]])
    assert oracle.within_capacity(experts, 2, 1).tolist() == [[True, False], [True, False]]


def test_gates_are_not_renormalised_after_dropping():
    config = MOE | {"decoder_sparse_step": 1, "num_hidden_layers": 1, "num_experts": 2}
    config |= {"moe_capacity_factor": 0.5}  # ⌈0.5·2·⌈2/2⌉⌉ = 1 assignment for each expert
    settings = oracle.read_config(config)
    arrays = random_weights(config)
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    router = torch.zeros(2, 8, dtype=torch.float64)
    router[0, 0], router[1, 1] = 1.0, 1.0
    x = torch.eye(2, 8, dtype=torch.float64)  # sub-token 0 prefers expert 0, sub-token 1 expert 1
    routing = oracle.route(settings, router, x)
    y = oracle.run_experts(settings, weights, "model.layers.0.mlp", x, routing)
    gate = math.e / (math.e + 1)
    for s in range(2):
        expert = oracle.ffn(settings, weights, f"model.layers.0.mlp.experts.{s}", x[s])
        np.testing.assert_allclose(y[s].numpy(), gate * expert.numpy(), rtol=1e-12)


@pytest.mark.parametrize("kind", ["top1", "topk"])
def test_balance_loss_is_one_when_balanced_and_grows_when_collapsed(kind):
    row = [0.4, 0.3, 0.2, 0.1]
    p = torch.tensor([np.roll(row, s).tolist() for s in range(4)], dtype=torch.float64)
    experts = torch.tensor([[s, (s + 1) % 4] for s in range(4)])
    assert float(oracle.balance_loss(p, experts, kind)) == pytest.approx(1.0)
    collapsed = torch.tensor([row] * 4, dtype=torch.float64)
    expected = 4 * 0.4 if kind == "top1" else 4 * (0.4 + 0.3) / 2
    loss = oracle.balance_loss(collapsed, torch.tensor([[0, 1]] * 4), kind)
    assert float(loss) == pytest.approx(expected)


def test_z_loss_by_hand():
    logits = torch.log(torch.tensor([[1.0, 2.0], [0.5, 0.5]], dtype=torch.float64))
    assert float(oracle.z_loss(logits)) == pytest.approx(math.log(3) ** 2 / 2)


def test_loss_adds_the_layers_of_the_router_losses():
    config = MOE | {"decoder_sparse_step": 1, "router_z_loss_coef": 0.1}
    result = run(config, random_weights(config))
    z = [np.log(np.exp(result[f"layers.{i}.router_logits"]).sum(-1)) ** 2 for i in range(2)]
    assert result["z_loss"] == pytest.approx(z[0].mean() + z[1].mean())
    expected = result["nll"] + 0.01 * result["aux_loss"] + 0.1 * result["z_loss"]
    assert result["loss"] == pytest.approx(expected)


# ---------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("config", [SMALL, MOE, MULTI_HEAD, EVERYTHING])
def test_gradient_agrees_with_a_finite_difference(config):
    weights = random_weights(config)
    tokens = TOKENS.copy()
    tokens[1, 4:] = -100
    result = oracle.trace(config, weights, tokens)
    random = np.random.default_rng(1)
    for name in weights:
        direction = random.standard_normal(weights[name].shape)
        step = 1e-6
        ends = [
            run(config, weights | {name: weights[name] + sign * step * direction}, tokens)
            for sign in (1, -1)
        ]
        slope = (ends[0]["loss"] - ends[1]["loss"]) / (2 * step)
        assert np.sum(result[f"grad.{name}"] * direction) == pytest.approx(slope, rel=1e-5, abs=1e-8), (
            name
        )


def test_every_tensor_of_the_trace_is_there():
    result = oracle.trace(EVERYTHING, random_weights(EVERYTHING), TOKENS)
    assert result["logits"].shape == (2, 5, 11)
    assert result["layers.0.hidden"].shape == (2, 5, 8)
    assert "layers.0.router_logits" not in result
    assert result["layers.1.router_logits"].shape == (20, 4)
    assert result["layers.1.experts"].shape == (20, 2)
    assert result["layers.1.experts"].dtype == np.int64
    names = {f"grad.{name}" for name in random_weights(EVERYTHING)}
    assert names == {name for name in result if name.startswith("grad.")}
    assert all(np.any(result[name] != 0) for name in names)


def test_float32_is_computed_in_float32():
    weights = random_weights(MULTI_HEAD)
    single = oracle.trace(MULTI_HEAD, weights, TOKENS, dtype=torch.float32)
    double = oracle.trace(MULTI_HEAD, weights, TOKENS)
    for name, value in single.items():
        if value.dtype != np.int64:
            assert value.dtype == np.float32, name
        np.testing.assert_allclose(value, double[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_an_expert_without_work_has_gradient_zero():
    config = MOE | {"num_experts_per_tok": 1}
    weights = random_weights(config)
    weights["model.layers.1.mlp.gate.weight"][:] = 0  # all ties: expert 0 takes everything
    result = oracle.trace(config, weights, TOKENS)
    assert np.all(result["layers.1.experts"] == 0)
    assert np.any(result["grad.model.layers.1.mlp.experts.0.up_proj.weight"] != 0)
    assert np.all(result["grad.model.layers.1.mlp.experts.1.up_proj.weight"] == 0)


# ------------------------------------------------------------------------------------ BitNet


@pytest.mark.parametrize("quantization", ["bitnet_b158", "bitnet"])
def test_bit_linear_by_hand(quantization):
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, -0.25, 0.25], [-1.5, 0.5, 1.0]], dtype=torch.float64)
    weight.requires_grad_(True)
    # γ = 2; x·63.5 = 63.5, -127, 31.75; the half goes to the even 64.
    q = np.array([64.0, -127.0, 32.0])
    # β = 4.5/6 = 0.75 and the mean is 1/6: W/β = 1.33, -0.33, 0.33; -2, 0.67, 1.33.
    beta = 0.75
    if quantization == "bitnet_b158":
        w = np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, 1.0]])
    else:
        w = np.array([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])
    y = oracle.BitLinear.apply(x, weight, quantization)
    np.testing.assert_allclose(y.detach().numpy(), [w @ q * (beta * 2 / 127)], rtol=1e-15)
    dy = np.array([[3.0, -5.0]])
    y.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(x.grad.numpy(), dy @ (beta * w), rtol=1e-15)
    np.testing.assert_allclose(weight.grad.numpy(), dy.T @ [q * 2 / 127], rtol=1e-15)


def test_quantiser_edge_cases():
    q, gamma = oracle.quantize_rows(torch.zeros(1, 2, dtype=torch.float64))
    assert q.tolist() == [[0, 0]]
    assert gamma.tolist() == [[1e-5]]
    w, beta = oracle.quantize_weight(torch.zeros(2, 2, dtype=torch.float64), "bitnet_b158")
    assert w.tolist() == [[0, 0], [0, 0]]
    assert float(beta) == 1e-5
    w, _ = oracle.quantize_weight(torch.full((1, 2), 0.5, dtype=torch.float64), "bitnet")
    assert w.tolist() == [[-1, -1]]  # exactly the mean is not above it


@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize("quantization", ["bitnet_b158", "bitnet"])
def test_what_is_quantised(quantization, projections):
    """Other latent values behind the same w and β change a full-precision layer alone."""
    config = EVERYTHING | {"quantization": quantization, "quantize_moe_projections": projections}
    full_precision = ["norm", "embed", "lm_head", ".mlp.gate.", ".bias"]
    if not projections:
        full_precision += ["head_proj", "merge_proj"]
    weights = random_weights(config)
    before = run(config, weights)["logits"]
    for name, array in weights.items():
        w, beta = oracle.quantize_weight(torch.from_numpy(array), quantization)
        other = (w * beta / w.abs().mean()).numpy()  # its mean magnitude is β again
        after = run(config, weights | {name: other})["logits"]
        changed = not np.allclose(before, after, rtol=1e-9)
        assert changed == any(part in name for part in full_precision), name


def test_sub_norms_default_to_quantised_models():
    def names(config: dict[str, Any]) -> set[str]:
        return set(oracle.expected_shapes(oracle.read_config(config)))

    assert not any("sub_norm" in name for name in names(MULTI_HEAD))
    quantised = names(MULTI_HEAD | {"quantization": "bitnet", "shared_expert_intermediate_size": 2})
    assert {name for name in quantised if "layers.1" in name and "sub_norm" in name} == {
        "model.layers.1.self_attn.attn_sub_norm.weight",
        "model.layers.1.mlp.shared_expert.ffn_sub_norm.weight",
        *(f"model.layers.1.mlp.experts.{e}.ffn_sub_norm.weight" for e in range(4)),
    }


# ----------------------------------------------------------------------------------- refusals


def test_unused_missing_and_misshapen_weights_are_refused():
    weights = random_weights(SMALL)
    with pytest.raises(ValueError, match=r"unused weights: \['lm_head.weight'\]"):
        run(SMALL, weights | {"lm_head.weight": np.zeros((11, 8))})
    with pytest.raises(ValueError, match=r"missing weights: \['model.norm.weight'\]"):
        run(SMALL, {k: v for k, v in weights.items() if k != "model.norm.weight"})
    with pytest.raises(ValueError, match="has shape"):
        run(SMALL, weights | {"model.norm.weight": np.ones(7)})


@pytest.mark.parametrize(
    "tokens",
    [[[1, -100, 2]], [[1, 11]], [[-1, 1]], [[1, -100]], [[1]], [1, 2]],
)
def test_bad_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match=r"token|padding"):
        run(SMALL, random_weights(SMALL), np.array(tokens))


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="unknown config keys"):
        oracle.read_config(SMALL | {"num_heads": 2})
    with pytest.raises(ValueError, match="norm_topk_prob"):
        oracle.read_config(MOE | {"num_experts_per_tok": 1, "norm_topk_prob": True})
    with pytest.raises(ValueError, match="quantization"):
        oracle.read_config(SMALL | {"quantization": "bitnet158"})
