"""An MH-MoE layer as one JAX function, and how it is run on the conformance vectors.

Written from SPECIFICATION.md, sections 3 to 5, without a loop over experts: every expert sees every
sub-token, and a matrix [M, E] of gates, 0 where an expert was not chosen or is full, picks what counts.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

HASTILY = {"xla_backend_optimization_level": 0}  # compiling takes longer than all there is to compute

Config = dict[str, Any]
Weights = dict[str, jax.Array]


def quantised(values: jax.Array, quantised_values: jax.Array) -> jax.Array:
    """Quantised there, the identity back."""
    return values + jax.lax.stop_gradient(quantised_values - values)


def bit_linear(x: jax.Array, w: jax.Array, quantization: str) -> jax.Array:
    """x [M, I] times w [..., O, I], each matrix with a scale of its own."""
    if quantization != "none":
        gamma = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), 1e-5)
        x = quantised(x, jnp.clip(jnp.round(x * (127 / gamma)), -128, 127) * (gamma / 127))
        beta = jnp.maximum(jnp.abs(w).mean(axis=(-2, -1), keepdims=True), 1e-5)
        if quantization == "bitnet_b158":
            acting = beta * jnp.clip(jnp.round(w * (1 / beta)), -1, 1)
        else:
            acting = jnp.where(w > w.mean(axis=(-2, -1), keepdims=True), beta, -beta)
        w = quantised(w, acting)
    return x @ jnp.swapaxes(w, -1, -2)


def feed_forward(x: jax.Array, weights: Weights, config: Config) -> jax.Array:
    """One network, or with stacked weights [E, ...] all experts at once: [E, M, U]."""
    quantization = config["quantization"]
    gate = bit_linear(x, weights["gate_proj.weight"], quantization)
    act = jax.nn.relu(gate) ** 2 if config["hidden_act"] == "relu2" else jax.nn.silu(gate)
    h = act * bit_linear(x, weights["up_proj.weight"], quantization)
    if config["use_sub_norm"]:
        rstd = jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + config["rms_norm_eps"])
        norm = weights["ffn_sub_norm.weight"]
        h = h * rstd * jnp.expand_dims(norm, -2)
    return bit_linear(h, weights["down_proj.weight"], quantization)


def gates_of(p: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Gates [M, K] and experts [M, K]; `top_k` leaves ties to the lower index."""
    gates, experts = jax.lax.top_k(p, config["num_experts_per_tok"])
    if config["norm_topk_prob"]:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    return gates, experts


def within_capacity(chosen: jax.Array, config: Config) -> jax.Array:
    """Which choices are kept, [M, K]; chosen [M, K, E] is one-hot."""
    M, K, E = chosen.shape
    factor = config["moe_capacity_factor"]
    if factor is None:
        return jnp.ones((M, K), bool)
    capacity = max(1, math.ceil(factor * K * math.ceil(M / E)))
    filling = jnp.swapaxes(chosen, 0, 1).reshape(K * M, E)  # all first choices, then all second ones
    place = (jnp.cumsum(filling, axis=0) * filling).sum(axis=-1)  # from 1
    return (place <= capacity).reshape(K, M).T


def moe_layer(
    x: jax.Array, weights: Weights, counted: jax.Array, config: Config, *, choose: Any = gates_of
) -> dict[str, jax.Array]:
    """x [N, D]; counted [N]: which tokens the router's losses see."""
    H, E = config["moe_heads"], config["num_experts"]
    quantization = config["quantization"] if config["quantize_moe_projections"] else "none"

    def projection(name: str, y: jax.Array) -> jax.Array:
        if f"{name}.weight" not in weights:
            return y
        return bit_linear(y, weights[f"{name}.weight"], quantization) + weights.get(f"{name}.bias", 0)

    sub_tokens = projection("mlp.head_proj", x).reshape(-1, x.shape[1] // H)
    logits = sub_tokens @ weights["mlp.gate.weight"].T
    p = jax.nn.softmax(logits, axis=-1)
    gates, experts = choose(p, config)
    chosen = jax.nn.one_hot(experts, E, dtype=x.dtype)  # [M, K, E]
    kept = within_capacity(chosen, config)
    gate_of_expert = jnp.einsum("mk,mke->me", gates * kept, chosen)

    parts = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    parts += ["ffn_sub_norm.weight"] if config["use_sub_norm"] else []
    stacked = {
        part: jnp.stack([weights[f"mlp.experts.{e}.{part}"] for e in range(E)]) for part in parts
    }
    y = jnp.einsum("me,emu->mu", gate_of_expert, feed_forward(sub_tokens, stacked, config))
    if config["moe_residual"]:
        y = y + sub_tokens
    y = projection("mlp.merge_proj", y.reshape(x.shape))
    if config["shared_expert_intermediate_size"]:
        shared = {part: weights[f"mlp.shared_expert.{part}"] for part in parts}
        y = y + feed_forward(x, shared, config)

    weight = jnp.repeat(counted, H).astype(x.dtype)
    weight = weight / weight.sum()  # a mean over the counted sub-tokens
    counts = chosen[:, 0] if config["router_aux_loss_type"] == "top1" else chosen.mean(axis=1)
    aux = E * jnp.sum(jax.lax.stop_gradient(weight @ counts) * (weight @ p))
    z = weight @ jax.nn.logsumexp(logits, axis=-1) ** 2
    return {"router_logits": logits, "experts": experts, "y_ND": y, "aux_loss": aux, "z_loss": z}


def results_of(config: Config, tensors: dict[str, Any], dtype: Any, *, choose: Any = gates_of) -> Any:
    """One vector `moe_layer/...`: its results and gradients.

    config: the vector's options; tensors: its file.
    """

    def total(x: jax.Array, weights: Weights) -> tuple[jax.Array, dict[str, jax.Array]]:
        results = moe_layer(x, weights, tensors["counted_N"], config, choose=choose)
        loss = jnp.sum(results["y_ND"] * tensors["dy_ND"].astype(dtype))
        loss += config["router_aux_loss_coef"] * results["aux_loss"]
        return loss + config["router_z_loss_coef"] * results["z_loss"], results

    weights = {
        name: tensor.astype(dtype) for name, tensor in tensors.items() if name.startswith("mlp.")
    }
    gradients = jax.grad(total, argnums=(0, 1), has_aux=True)
    run = jax.jit(gradients, compiler_options=HASTILY)
    (dx, dweights), results = run(tensors["x_ND"].astype(dtype), weights)
    return {**results, "dx_ND": dx, **{f"grad.{name}": dw for name, dw in dweights.items()}}
