"""Whether a model has room in memory, from its configuration alone, before any of it is made.

What is counted is less than what it takes in the end: a model that fits is never refused.
"""

from __future__ import annotations

import math

from mhmoe_np.model.parameters import parameter_table
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.memory import check_memory

FLOAT = 4  # bytes
# Of an angle: cosine, sine and its negative; while they are made, the same and the angle in float64.
ROTARY, ROTARY_MAKING = 3 * 4, 3 * 4 + 4 * 8


def check_room(config: ModelConfig, *, copies: int, source: str) -> None:
    """Refuse a model that cannot fit into the memory that is free.

    copies: how often float32 numbers are held for all parameters: 1 to run a model, 2 with its
    gradient, 4 to train it; 0 for packed ones, which are no larger than their file.
    source: what the message names, as the file that the configuration came from.

    Raises   UserError: it needs more.
    Source   [spec 1 tensor names], [spec 2 RoPE]
    """
    count = sum(math.prod(entry.shape) for entry in parameter_table(config))
    angles = config.max_position_embeddings * config.head_dim // 2
    needed = max(
        copies * FLOAT * count + ROTARY * angles,
        min(copies, 1) * FLOAT * count + ROTARY_MAKING * angles,
    )
    held = {0: "packed", 1: "in float32", 4: "with gradient and two moments"}
    check_memory(
        needed,
        f"{source}: the model's {count:,} parameters, {held.get(copies, f'{copies} times')}, and the "
        f"angles of {config.max_position_embeddings:,} positions need",
        remedy="make the model smaller, or lower max_position_embeddings",
    )


def check_batch_room(config: ModelConfig, *, tokens: int, source: str) -> None:
    """Refuse to train on so many tokens at once that what the backward needs cannot fit.

    Every layer keeps at least its input.

    source: what the message names, as the keys that say how many tokens there are.

    Raises   UserError: it needs more.
    Source   [spec 2 pre-norm]
    """
    check_memory(
        FLOAT * tokens * config.hidden_size * config.num_hidden_layers,
        f"{source}: the activations of {tokens:,} tokens at once need more than",
        remedy="lower training.batch_size or training.sequence_length, or raise "
        "training.gradient_accumulation_steps",
    )
