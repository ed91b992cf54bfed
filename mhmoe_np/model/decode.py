"""The same forward with a key-value cache: one new token costs one token's work.

Equality with the full forward is a test. Capacity never applies here: what an expert can take would
depend on how many tokens happen to come together [D4].
"""

from __future__ import annotations

import numpy as np

from mhmoe_np.layers.attention import project_heads, project_out, split_heads
from mhmoe_np.layers.block import NORM, NORM_2, feed_forward_half
from mhmoe_np.model.language_model import Model
from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray, IntArray


class KeyValueCache:
    """The keys and values of all positions so far, for each layer.

    Attributes:
        length: positions filled.
        layers: one array for each layer, [B, S, 2G, C]: keys, then values.
    """

    def __init__(self, model: Model, *, sequences: int, positions: int) -> None:
        """Room for `positions` positions of `sequences` sequences.

        Raises ValueError: more positions than the model has.
        """
        config = model.config
        if positions > config.max_position_embeddings:
            raise ValueError(
                f"{positions} positions are more than max_position_embeddings "
                f"{config.max_position_embeddings}"
            )
        shape = (sequences, positions, 2 * config.num_key_value_heads, config.head_dim)
        dtype = model.weights.dtype
        self.length = 0
        self.layers: list[FloatArray] = [
            np.empty(shape, dtype) for _ in range(config.num_hidden_layers)
        ]


def decode(model: Model, cache: KeyValueCache, id_BT: IntArray, *, ops: Operations) -> FloatArray:
    """Extend the cache by T tokens of each sequence; return the logits_BV after the last.

    Raises ValueError: the cache has no room for them.
    """
    config, weights, _ = model
    B, T = id_BT.shape
    G = config.num_key_value_heads
    first, last = cache.length, cache.length + T
    if last > cache.layers[0].shape[1]:
        raise ValueError(f"{last} positions do not fit the cache's {cache.layers[0].shape[1]}")
    rotary = model.rotary.window(first, last)
    counted_N = np.ones(B * T, np.bool_)
    x_ND = ops.embedding(id_BT.reshape(-1), weights.embedding_VD)
    for layer, (w, kv_BSGC) in enumerate(zip(weights.blocks, cache.layers, strict=True)):
        normed_ND, _ = ops.rms_norm(x_ND, w[NORM], eps=config.rms_norm_eps)
        qkv_BTQ = project_heads(normed_ND, w, rotary, sequences=B, config=config, ops=ops)
        q_BTAC, k_BTGC, v_BTGC = split_heads(qkv_BTQ, config)
        kv_BSGC[:, first:last, :G] = k_BTGC
        kv_BSGC[:, first:last, G:] = v_BTGC
        out_BTAC, _ = ops.attention(q_BTAC, kv_BSGC[:, :last, :G], kv_BSGC[:, :last, G:])
        x_ND = x_ND + project_out(out_BTAC, w, config=config, ops=ops)[0]
        normed_ND, _ = ops.rms_norm(x_ND, w[NORM_2], eps=config.rms_norm_eps)
        x_ND = (
            x_ND
            + feed_forward_half(
                normed_ND,
                w,
                counted_N,
                is_moe=config.is_moe_layer(layer),
                drop=False,
                config=config,
                ops=ops,
            )[0]
        )
    cache.length = last
    last_BD = np.ascontiguousarray(x_ND.reshape(B, T, -1)[:, -1])
    y_BD, _ = ops.rms_norm(last_BD, weights.final_norm_D, eps=config.rms_norm_eps)
    return ops.linear(y_BD, weights.output_VD, None)
