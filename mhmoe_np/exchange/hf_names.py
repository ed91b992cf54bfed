"""What transformers calls the tensors, and which of ours lie in each of theirs.

Its version 4 wrote one tensor for each expert, under the names of the first release of a class;
version 5 joins them as our parameter table does, and reads both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mhmoe_np.model.parameters import Entry, Part, parameter_table
from mhmoe_np.settings.model import ModelConfig


class Spelling(NamedTuple):
    """How a class names its tensors. What neither table has is named as here."""

    arrays: Mapping[str, str]  # arrays of the parameter table that are one tensor there, by their ends
    tensors: Mapping[str, str]  # patterns of ends of tensors' names, and what stands there instead


class TheirTensor(NamedTuple):
    """A tensor of a class of transformers, and where ours lie in it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    entry: Entry


PLAIN = Spelling({}, {})

MIXTRAL_4 = Spelling(
    {},
    {
        r"mlp\.gate\.weight": r"block_sparse_moe.gate.weight",
        r"mlp\.experts\.(\d+)\.gate_proj\.weight": r"block_sparse_moe.experts.\1.w1.weight",
        r"mlp\.experts\.(\d+)\.down_proj\.weight": r"block_sparse_moe.experts.\1.w2.weight",
        r"mlp\.experts\.(\d+)\.up_proj\.weight": r"block_sparse_moe.experts.\1.w3.weight",
    },
)

JOINED_EXPERTS = Spelling(
    {
        "mlp.experts.gate_up_proj.weight": "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj.weight": "mlp.experts.down_proj",
    },
    {},
)

_GRANITE_SHARED = {
    "mlp.shared_expert.gate_up_proj.weight": "shared_mlp.input_linear.weight",
    "mlp.shared_expert.down_proj.weight": "shared_mlp.output_linear.weight",
}

GRANITE_4 = Spelling(
    {
        "mlp.experts.gate_up_proj.weight": "block_sparse_moe.input_linear.weight",
        "mlp.experts.down_proj.weight": "block_sparse_moe.output_linear.weight",
        **_GRANITE_SHARED,
    },
    {r"mlp\.gate\.weight": r"block_sparse_moe.router.layer.weight"},
)

GRANITE_5 = Spelling(
    {
        "mlp.experts.gate_up_proj.weight": "block_sparse_moe.experts.gate_up_proj",
        "mlp.experts.down_proj.weight": "block_sparse_moe.experts.down_proj",
        **_GRANITE_SHARED,
    },
    {r"mlp\.gate\.weight": r"block_sparse_moe.router.weight"},
)


def their_tensors(config: ModelConfig, spelling: Spelling) -> Iterator[TheirTensor]:
    """Every tensor of a model as the class stores it, in the order of the parameter table."""
    for entry in parameter_table(config):
        end = next((end for end in spelling.arrays if entry.name.endswith(f".{end}")), None)
        if end is not None:
            name = entry.name.removesuffix(end) + spelling.arrays[end]
            yield TheirTensor(name, entry.shape, entry.parts, entry)
            continue
        shapes = np.broadcast_to(np.float32(0), entry.shape)  # of any size, in four bytes
        for part in entry.parts:
            name = _renamed(part.tensor, spelling)
            yield TheirTensor(name, shapes[part.where].shape, (part._replace(where=()),), entry)


def _renamed(name: str, spelling: Spelling) -> str:
    for pattern, theirs in spelling.tensors.items():
        renamed, found = re.subn(rf"(?<=\.){pattern}$", theirs, name)
        if found:
            return renamed
    return name
