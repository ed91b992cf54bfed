"""The same forward with a key-value cache: one new token costs one token's work.

Equality with the full forward is a test. Capacity never applies here: what an expert can take would
depend on how many tokens happen to come together [D4].
"""

from __future__ import annotations

from mhmoe_np.layers.attention import Past
from mhmoe_np.layers.block import block_forward
from mhmoe_np.model.language_model import Model, start
from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray, IntArray


class KeyValueCache:
    """The keys and values of all positions so far, for each layer.

    Attributes:
        length: positions filled.
        positions: that there is room for.
        layers: the backend's array of each layer, [B, Y, 2G, C]: keys, then values.
    """

    def __init__(self, model: Model, *, sequences: int, positions: int, ops: Operations) -> None:
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
        self.length, self.positions = 0, positions
        self.layers: list[FloatArray] = [
            ops.zeros(shape, model.weights.dtype) for _ in range(config.num_hidden_layers)
        ]

    def pasts(self) -> list[Past]:
        """What each layer has seen."""
        return [Past(kv_BY2GC, self.length) for kv_BY2GC in self.layers]


def decode(model: Model, cache: KeyValueCache, id_BT: IntArray, *, ops: Operations) -> FloatArray:
    """Extend the cache by T tokens of each sequence; return the logits after the last.

    id_BT: the host's.

    Shapes   id_BT -> logits_BV
    Raises   ValueError: the cache has no room for them, or what `start` raises.
    Source   [spec 2 logits], [D4]
    """
    config, weights, _ = model
    B, T = id_BT.shape
    last = cache.length + T
    if last > cache.positions:
        raise ValueError(f"{last} positions do not fit the cache's {cache.positions}")
    _, x_ND, rotary = start(model, id_BT, first=cache.length, ops=ops)
    for w, past in zip(weights.blocks, cache.pasts(), strict=True):
        x_ND, _ = block_forward(
            x_ND, w, rotary, past, None, sequences=B, drop=False, config=config, ops=ops
        )
    cache.length = last
    last_BD = ops.empty((B, config.hidden_size), model.weights.dtype)
    last_BD[...] = x_ND.reshape(B, T, -1)[:, -1]
    y_BD, _ = ops.rms_norm(last_BD, weights.final_norm_D, eps=config.rms_norm_eps)
    return ops.linear(y_BD, weights.output_VD, None)
