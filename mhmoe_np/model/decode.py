"""The same forward with a key-value cache: one new token costs one token's work.

Equality with the full forward is a test. Capacity never applies here: what an expert can take would
depend on how many tokens happen to come together [D4].
"""

from __future__ import annotations

import numpy as np

from mhmoe_np.layers.attention import OUT, QKV, SUB_NORM, Past
from mhmoe_np.layers.block import NORM, NORM_2, block_forward
from mhmoe_np.layers.feed_forward import DENSE
from mhmoe_np.layers.moe import ROUTER, moe_forward
from mhmoe_np.model.language_model import Model, checked_ids
from mhmoe_np.operations.table import (
    AttentionBranch,
    Branch,
    FeedForwardBranch,
    JoinedStep,
    LayerWeights,
    Operations,
    Weight,
)
from mhmoe_np.types import FloatArray, IntArray


def branches_of(w: LayerWeights, kv_BS2GC: FloatArray) -> list[Branch]:
    """The halves of a layer that `Operations.joined_step` knows: all but a MoE layer's second one.

    Shapes   kv_BS2GC
    Source   [spec 2 pre-norm]
    """
    branches: list[Branch] = [AttentionBranch(w[NORM], w[QKV], w.get(SUB_NORM), w[OUT], kv_BS2GC)]
    if ROUTER not in w:
        gate_up, sub_norm, down = (
            f"{DENSE}.{name}.weight" for name in ("gate_up_proj", "ffn_sub_norm", "down_proj")
        )
        branches.append(FeedForwardBranch(w[NORM_2], w[gate_up], w.get(sub_norm), w[down]))
    return branches


class KeyValueCache:
    """The keys and values of all positions so far, for each layer.

    Attributes:
        length: positions filled.
        positions: that there is room for.
        layers: the backend's array of each layer, [B, S, 2G, C]: keys, then values.
        last_BD: what the output head met in the last `extend`, valid as long as its logits.
    """

    def __init__(
        self,
        model: Model,
        *,
        sequences: int,
        positions: int,
        head: Weight | None = None,
        joined: bool = True,
        ops: Operations,
    ) -> None:
        """Room for `positions` positions of `sequences` sequences.

        head: what logits are computed by; None: the model's output head.
        joined: let the backend join the work of a token, if it does; compiling it pays for many tokens.

        Raises ValueError: more positions than the model has.
        """
        config = model.config
        if positions > config.max_position_embeddings:
            raise ValueError(
                f"{positions} positions are more than max_position_embeddings "
                f"{config.max_position_embeddings}"
            )
        shape = (sequences, positions, 2 * config.num_key_value_heads, config.head_dim)
        self.length, self.positions = 0, positions
        self._model, self._ops = model, ops
        self._head = model.weights.output_VD if head is None else head
        self.last_BD: FloatArray | None = None
        self.layers: list[FloatArray] = [
            ops.zeros(shape, model.weights.dtype) for _ in range(config.num_hidden_layers)
        ]
        self._extended = ops.repeated(self._logits)
        self._joined = self._joined_pieces() if joined else None

    def _joined_pieces(self) -> list[tuple[JoinedStep, LayerWeights | None]] | None:
        """A token's work as the backend joins it, each piece up to a MoE layer that follows.

        None: it does not join these.
        """
        (config, weights, _), ops = self._model, self._ops
        pieces: list[tuple[list[Branch], LayerWeights | None]] = []
        for w, kv_BS2GC in zip(weights.blocks, self.layers, strict=True):
            before = pieces.pop()[0] if pieces and pieces[-1][1] is None else []
            pieces.append(([*before, *branches_of(w, kv_BS2GC)], w if ROUTER in w else None))
        joined = []
        for branches, moe in pieces:
            step = ops.joined_step(branches, activation=config.hidden_act, eps=config.rms_norm_eps)
            if step is None:
                return None
            joined.append((step, moe))
        return joined

    def extend(self, id_BT: IntArray) -> FloatArray:
        """Put T more tokens of each sequence behind; return the logits after the last.

        id_BT: the host's. The logits are the backend's, valid until its next operation.

        Shapes   id_BT -> logits_BV
        Raises   ValueError: there is no room for them, or see `checked_ids`.
        Source   [spec 2 logits], [D4]
        """
        first, last = self.length, self.length + id_BT.shape[1]
        if last > self.positions:
            raise ValueError(f"{last} positions do not fit the cache's {self.positions}")
        id_BT = checked_ids(id_BT, self._model.config, first=first)
        logits_BV: FloatArray
        logits_BV, self.last_BD = self._extended(None, id_BT, np.array([first]))
        self.length = last
        return logits_BV

    def _logits(self, fixed: None, id_BT: IntArray, first_1: IntArray) -> tuple[FloatArray, FloatArray]:
        """On the device; nothing here depends on how many positions are filled but first_1."""
        (config, weights, rotary), ops = self._model, self._ops
        B, T = id_BT.shape
        rotary = rotary._replace(first_1=first_1)
        x_ND = ops.embedding(id_BT.reshape(-1), weights.embedding_VD)
        if T == 1 and self._joined is not None:
            for step, moe in self._joined:
                step(x_ND, rotary.cos_YJ, rotary.sin_YJ, first_1)
                if moe is not None:
                    normed_ND, _ = ops.rms_norm(x_ND, moe[NORM_2], eps=config.rms_norm_eps)
                    y_ND, _ = moe_forward(normed_ND, moe, None, drop=False, config=config, ops=ops)
                    ops.add_in_place(y_ND, x_ND)
        else:
            for w, kv_BS2GC in zip(weights.blocks, self.layers, strict=True):
                past = Past(kv_BS2GC, first_1)
                x_ND, _ = block_forward(
                    x_ND, w, rotary, past, None, sequences=B, drop=False, config=config, ops=ops
                )
        last_BD = ops.empty((B, config.hidden_size), weights.dtype)
        last_BD[...] = x_ND.reshape(B, T, -1)[:, -1]
        y_BD, _ = ops.rms_norm(last_BD, weights.final_norm_D, eps=config.rms_norm_eps)
        return ops.linear(y_BD, self._head, None), y_BD
