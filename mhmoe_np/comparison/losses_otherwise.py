"""Losses that implementations compute otherwise, from the router's logits and choices in a trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mhmoe_np.comparison.trace_file import Trace
from mhmoe_np.comparison.two_traces import compare_tensors
from mhmoe_np.model.loss import IGNORED
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray, IntArray


class _Router(NamedTuple):
    """One layer's router on the sub-tokens that count."""

    logits_ME: FloatArray
    p_ME: FloatArray
    expert_MK: IntArray
    all_p_ME: FloatArray  # padded positions too
    all_expert_MK: IntArray


def cause_of_loss(name: str, theirs: Trace, config: ModelConfig, tolerance: float | None) -> str | None:
    """The way of computing `aux_loss`, `z_loss` or `loss` that gives theirs; None: none known here."""
    routers = _routers_of(theirs, config)
    if name == "loss":
        ways = _losses(theirs, config)
    elif not routers:
        return None
    else:
        ways = _balance_losses(routers, config) if name == "aux_loss" else _z_losses(routers)
    for cause, value in ways:
        ours = {name: np.array(value, theirs[name].dtype)}
        if compare_tensors(name, theirs, ours, tolerance=tolerance).verdict == "same":
            return cause
    return None


def _routers_of(theirs: Trace, config: ModelConfig) -> list[_Router]:
    """Every MoE layer's, or none where the trace lacks one."""
    routers = []
    target = theirs.get("target_ids")
    for layer in filter(config.is_moe_layer, range(config.num_hidden_layers)):
        logits_ME = theirs.get(f"layers.{layer}.router_logits")
        expert_MK = theirs.get(f"layers.{layer}.experts")
        if logits_ME is None or expert_MK is None or target is None:
            return []
        p_ME = np.exp(logits_ME - logits_ME.max(axis=1, keepdims=True))
        p_ME /= p_ME.sum(axis=1, keepdims=True)
        counted = np.repeat(target.ravel() != IGNORED, config.moe_heads)
        routers.append(_Router(logits_ME[counted], p_ME[counted], expert_MK[counted], p_ME, expert_MK))
    return routers


def _balance(p_ME: FloatArray, chosen: IntArray) -> float:
    """E * sum_e f_e * mean_s p[s, e], f_e the share of `chosen` that is e.

    Shapes   p_ME
    """
    E = p_ME.shape[1]
    share_E = np.bincount(chosen.ravel(), minlength=E) / chosen.size
    return float(E * np.sum(share_E * p_ME.mean(axis=0)))


def _balance_losses(routers: list[_Router], config: ModelConfig) -> Iterator[tuple[str, float]]:
    K, E, own = config.num_experts_per_tok, config.num_experts, config.router_aux_loss_type
    chosen = [router.expert_MK[:, :1] if own == "top1" else router.expert_MK for router in routers]
    right = sum(_balance(router.p_ME, own) for router, own in zip(routers, chosen, strict=True))
    if own == "topk":
        value = sum(_balance(router.p_ME, router.expert_MK[:, 0]) for router in routers)
        yield "shares are those of the first choices (top1), not of all (topk)", value
    else:
        value = sum(_balance(router.p_ME, router.expert_MK) for router in routers)
        yield "shares are those of all choices (topk), not of the first ones (top1)", value
    for j in range(1, K):
        value = sum(_balance(router.p_ME, router.expert_MK[:, j]) for router in routers)
        which = "the last choices" if j == K - 1 else f"choices number {j + 1}"
        yield f"shares are those of {which} (experts[:, {j}]), not of the first ones", value
    value = sum(_balance(router.p_ME, router.p_ME.argmin(axis=1)) for router in routers)
    yield "shares are those of the least probable expert, not of the first choices", value
    value = sum(
        _balance(router.all_p_ME, router.all_expert_MK[:, : None if own == "topk" else 1])
        for router in routers
    )
    yield "positions whose target is -100 are counted", value
    pooled_p_ME = np.concatenate([router.p_ME for router in routers])
    yield "layers are pooled, not summed", _balance(pooled_p_ME, np.concatenate(chosen))
    yield "the factor E is missing", right / E
    yield "it is the mean over the layers, not the sum", right / len(routers)
    yield "shares sum to K, not to 1, over the experts", right * K
    yield "the coefficient is in it already", right * config.router_aux_loss_coef


def _z_losses(routers: list[_Router]) -> Iterator[tuple[str, float]]:
    sums = [np.log(np.exp(router.logits_ME).sum(axis=1)) for router in routers]
    yield "log-sum-exps are not squared", float(sum(each.mean() for each in sums))
    yield "it is the sum over sub-tokens, not the mean", float(sum((each**2).sum() for each in sums))
    squares = sum((each**2).mean() for each in sums)
    yield "it is the mean over the layers, not the sum", float(squares / len(sums))


def _losses(theirs: Trace, config: ModelConfig) -> Iterator[tuple[str, float]]:
    parts = [float(theirs[name]) for name in ("nll", "aux_loss", "z_loss") if name in theirs]
    if len(parts) < 3:
        return
    nll, aux, z = parts
    yield "it is the NLL alone", nll
    yield "the z-loss is left out", nll + config.router_aux_loss_coef * aux
    yield "the balance loss is left out", nll + config.router_z_loss_coef * z
    yield "balance loss and z-loss come without their coefficients", nll + aux + z
